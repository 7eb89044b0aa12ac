"""Runs of numbers are found again wherever their bounds are; the files of hundreds of ranks cost a rank little."""

import dataclasses
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.state import files
from cogview2.pipeline.training.state.files import (
    WEIGHT,
    Entry,
    RankState,
    StateReader,
    file_name,
    read_header,
    state_files,
    write_rank_state,
)
from cogview2.pipeline.training.state.manifest import UnreadableError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32)
PARAMETERS, KEYS = 580, (WEIGHT, "exp_avg", "exp_avg_sq", "step")
BYTES_OF_A_RUN = 100
"""At most, while all are sorted; 40 stay. As Python objects they took 230, and their open files as much again."""


def _write(folder: Path, ranks: list[dict[Entry, torch.Tensor]], shapes: dict[str, tuple[int, ...]]) -> None:
    for rank, entries in enumerate(ranks):
        own = {"meters": torch.full((2,), float(rank))}
        write_rank_state(
            folder / file_name(rank), RankState(entries, shapes, own, {"global_steps": 4 + rank})
        )


def _shared(folder: Path, count: int, parameters: int) -> dict[str, torch.Tensor]:
    """Write `count` files with a share of each parameter, as ZeRO 3 has them; returns the whole parameters."""
    whole = {
        f"layers.{i}.weight": torch.arange(2.0 * count).view(count, 2) + 1000 * i for i in range(parameters)
    }
    shapes = {name: tuple(value.shape) for name, value in whole.items()}
    ranks = [
        {Entry(key, 2 * rank, name): value[rank] for name, value in whole.items() for key in KEYS}
        for rank in range(count)
    ]
    _write(folder, ranks, shapes)
    return whole


@pytest.mark.parametrize("seed", range(5))
def test_any_part_of_any_cut_is_what_was_written(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    ranks: list[dict[Entry, torch.Tensor]] = [{} for _ in range(4)]
    whole = {}
    for number in range(6):
        name, dtype, count = f"p{number}/with a slash", rng.choice(DTYPES), rng.randrange(1, 50)
        whole[name] = torch.arange(count).to(dtype)
        cuts = sorted({0, count, *(rng.randrange(count) for _ in range(rng.randrange(8)))})
        for first, last in zip(cuts, cuts[1:], strict=False):
            ranks[rng.randrange(4)][Entry(WEIGHT, first, name)] = whole[name][first:last]
    ranks[3][Entry(WEIGHT, 0, "p0/with a slash")] = whole[
        "p0/with a slash"
    ].clone()  # two ranks may hold the same
    _write(tmp_path, ranks, {name: tuple(value.shape) for name, value in whole.items()})
    reader = StateReader(tmp_path)
    assert reader.names() == reader.every_name() == sorted(whole) and reader.names("exp_avg") == []
    for name, value in whole.items():
        assert torch.equal(reader.whole(name), value) and torch.equal(
            reader.every_number(name, WEIGHT), value
        )
        for _ in range(20):
            start = rng.randrange(len(value))
            count = rng.randrange(1, len(value) - start + 1)
            found = reader.read(name, WEIGHT, start, count)
            assert found.dtype == value.dtype and torch.equal(found, value[start : start + count])
        with pytest.raises(CheckpointError, match=f"holds no weight of {name} from {len(value)} on"):
            reader.read(name, WEIGHT, 0, len(value) + 1)
    with pytest.raises(CheckpointError, match="holds no exp_avg of p1"):
        reader.read("p1/with a slash", "exp_avg", 0, 1)
    assert reader.plain == {"global_steps": 4} and reader.ranks == 4
    assert reader.own(2)["meters"].tolist() == [2, 2]


def test_a_hole_between_two_files_is_named(tmp_path: Path) -> None:
    parts = [{Entry(WEIGHT, 0, "w"): torch.ones(3)}, {Entry(WEIGHT, 4, "w"): torch.ones(3)}]
    _write(tmp_path, parts, {"w": (7,)})
    assert StateReader(tmp_path).read("w", WEIGHT, 4, 3).tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="holds no weight of w from 3 on; use another checkpoint"):
        StateReader(tmp_path).whole("w")


def test_only_files_of_which_something_is_read_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _shared(tmp_path, count=8, parameters=3)
    headers = [read_header(tmp_path / name) for name in state_files(path.name for path in tmp_path.iterdir())]
    real: Callable[..., torch.Tensor] = torch.from_file
    opened, signs = [], []
    monkeypatch.setattr(
        files.torch, "from_file", lambda path, **how: opened.append(Path(path).name) or real(path, **how)
    )
    monkeypatch.setattr(files.watchdog, "progress", lambda: signs.append(1))
    reader = StateReader(tmp_path, reversed(headers))
    assert not opened and not signs
    for name, value in whole.items():
        assert torch.equal(reader.read(name, WEIGHT, 2 * 5, 2), value[5])
    assert opened == [file_name(5)] and signs
    assert torch.equal(reader.whole("layers.1.weight"), whole["layers.1.weight"])
    assert sorted(opened) == [file_name(rank) for rank in range(8)]


def test_a_million_runs_take_little_memory(tmp_path: Path) -> None:
    """The files of 256 ranks: one is written, the others differ by where their runs begin."""
    _shared(tmp_path, count=1, parameters=PARAMETERS)
    one = read_header(tmp_path / file_name(0))
    assert len(one.words) + len(one.runs) < 30_000  # 2 * 256 of them are in memory when they are exchanged
    runs = files.np.frombuffer(files.zlib.decompress(one.runs), files._RUNS).copy()
    headers = []
    for rank in range(256):
        runs["start"] = 2 * rank
        headers.append(
            dataclasses.replace(one, file=file_name(rank), runs=files.zlib.compress(runs.tobytes(), 1))
        )
    tracemalloc.start()
    try:
        reader = StateReader(tmp_path, headers)
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    count = 256 * PARAMETERS * len(KEYS)
    print(f"{count} runs: {stays / count:.0f} bytes each, {peak / count:.0f} while they are sorted")
    assert stays / count < BYTES_OF_A_RUN / 2 and peak / count < 2 * BYTES_OF_A_RUN
    assert reader.ranks == 256 and len(reader.names()) == PARAMETERS


def _rewrite(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Change a file's own list of tensors."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])


TENSOR = "state/weight/0/w"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[TENSOR].update(data_offsets=[0, 4000], shape=[1000]),
        lambda header: header[TENSOR].update(data_offsets=[0, 8]),
        lambda header: header[TENSOR].update(data_offsets=[-12, 0]),
        lambda header: header[TENSOR].update(data_offsets=[1, 9], shape=[2]),
        lambda header: header[TENSOR].update(dtype="F4"),
        lambda header: header[TENSOR].update(shape=[1, 3]),
        lambda header: header.update({"state/weight/x/w": header[TENSOR]}),
        lambda header: header.update({"state/weight": header[TENSOR]}),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update({TENSOR: None}),
    ],
)
def test_a_list_of_tensors_that_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[dict[str, dict[str, object]]], object]
) -> None:
    _write(tmp_path, [{Entry(WEIGHT, 0, "w"): torch.ones(3)}], {"w": (3,)})
    _rewrite(tmp_path / file_name(0), lambda header: None)
    assert StateReader(tmp_path).whole("w").tolist() == [1, 1, 1]
    _rewrite(tmp_path / file_name(0), change)
    with pytest.raises(
        CheckpointError, match=r"rank_00000\.safetensors is no state of a rank \(.*; use another"
    ):
        StateReader(tmp_path)


@pytest.mark.parametrize("data", [b"", b"12", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / file_name(0)).write_bytes(data)
    with pytest.raises(CheckpointError, match="is no state of a rank"):
        StateReader(tmp_path)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no rank_\*\.safetensors"):
        StateReader(tmp_path)


def test_a_disk_that_gives_nothing_is_not_called_damage(tmp_path: Path) -> None:
    _write(tmp_path, [{Entry(WEIGHT, 0, "w"): torch.ones(3)}], {"w": (3,)})
    reader = StateReader(tmp_path)
    (tmp_path / file_name(0)).unlink()
    for action in (
        lambda: reader.whole("w"),
        lambda: reader.own(0),
        lambda: read_header(tmp_path / file_name(0)),
    ):
        with pytest.raises(UnreadableError, match="cannot be read now"):
            action()


def _rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _swap(header: dict[str, Any]) -> None:
    """Let the weights be those numbers that are the moments."""
    weight, moment = (header[f"state/{key}/0/w"] for key in (WEIGHT, "exp_avg"))
    weight["data_offsets"] = moment["data_offsets"]


def _lengthen(header: dict[str, Any]) -> None:
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[name]["data_offsets"][1] += 4
    header[name]["shape"][0] += 1


def _rename(header: dict[str, Any]) -> None:
    header[f"state/{WEIGHT}/{2**70}/w"] = header.pop(f"state/{WEIGHT}/0/w")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_swap, "is not where it says"),
        (_lengthen, "its numbers end elsewhere than the file"),
        (_rename, "is no state of a rank"),
        (lambda header: header.pop("state/exp_avg/0/w"), "is not where it says"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    """Whatever its digest: a file without overlaps and gaps cannot give the numbers of one tensor for another's."""
    _write(tmp_path, [{Entry(key, 0, "w"): torch.ones(4) for key in (WEIGHT, "exp_avg")}], {"w": (4,)})
    _rewrite_header(tmp_path / file_name(0), lambda header: None)
    assert StateReader(tmp_path).whole("w").tolist() == [1, 1, 1, 1]
    _rewrite_header(tmp_path / file_name(0), change)
    with pytest.raises(CheckpointError, match=said):
        StateReader(tmp_path)


def test_a_copy_is_one_block_of_its_own(tmp_path: Path) -> None:
    entries = {Entry(WEIGHT, 0, str(dtype)): torch.arange(5).to(dtype) for dtype in DTYPES}
    entries[Entry(WEIGHT, 0, "none")] = torch.zeros(0)
    state = RankState(entries, {}, {"flag": torch.ones(3, dtype=torch.bool)})
    copy = state.copy()
    tensors = [*copy.entries.values(), *copy.own.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    for entry, tensor in entries.items():
        kept = tensor.clone()
        tensor.zero_()
        assert torch.equal(copy.entries[entry], kept) and copy.entries[entry].dtype == kept.dtype
    assert copy.own["flag"].all()
