"""Every kind of malformed input gets the verdict that docs/data.md gives it, in little time and memory; its neighbours stay.

Kinds are built from a seed (tests/support/malformed_*.py), so that none of these files lies in the repository.
"""

import json
import os
import random
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import malformed_images
import malformed_tars
import pytest
from malformed_images import ACCEPTED, MIN_SIDE, good
from malformed_texts import CAPTIONS, LINES, NAMES, text_of

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data import captions, folder, images, listing, tar_members, tars
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.data.sources import Source, open_source
from cogview2.pipeline.errors import DataError

SEED = 20260103
SECONDS = 5
MIB = 1024
DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
RULES = DataConfig().images


def apart(work: Callable[[], Any], seconds: int = SECONDS) -> tuple[Any, int]:
    """Run `work` in a fork; return its plain result and the memory that it added at its peak, in KiB.

    A crash of the interpreter or an endless loop fails the test that asked, not the whole session.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is used now
        before = _peak()
        try:
            answer: dict[str, Any] = {"result": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(answer | {"grown": _peak() - before}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"ended with {status}" + (
        f" (slower than {seconds} s)" if status == -signal.SIGALRM else ""
    )
    answer = json.loads(said)
    assert "error" not in answer, answer["error"]
    return answer["result"], answer["grown"]


def _peak() -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", text)[0])


def opened(path: Path) -> Source:
    return open_source(DataConfig.model_validate({"source": str(path)}), SEED)


def verdicts(source: Source) -> dict[str, str]:
    """Read and decode every record of a source as the sharder does: name -> verdict."""
    found: dict[str, str] = {}
    for index in range(len(source)):
        name = source.keys[index]
        try:
            pair = source.read(index)
            name = str(pair.metadata["source_name"])
            assert images.open_image(pair.image, RULES, MIN_SIDE).mode == "RGB"
            found[name] = ACCEPTED
        except RefusedError as error:
            assert error.detail
            found[name] = error.reason
    return found


@pytest.fixture(autouse=True)
def nothing_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What would run a payload leaves a file MARK in the working directory, or EVIL_* in the temporary folder."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("MARK"))
    assert not list(Path(tempfile.gettempdir()).glob("EVIL_*"))


@pytest.mark.parametrize("kind", malformed_images.KINDS, ids=lambda kind: kind.name)
def test_images(tmp_path: Path, kind: malformed_images.Kind) -> None:
    data = tmp_path / "data"
    data.mkdir()
    contents = {"a": good(random.Random(1)), "b": kind.make(random.Random(SEED)), "c": good(random.Random(2))}
    for name, content in contents.items():
        (data / f"{name}.jpg").write_bytes(content)
        (data / f"{name}.txt").write_text(f"picture {name}")
    found, grown = apart(lambda: verdicts(opened(data)))
    assert found == {"a": ACCEPTED, "b": kind.verdict, "c": ACCEPTED}
    assert grown < 256 * MIB


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda caption: caption.name)
def test_captions(tmp_path: Path, caption: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, content in {"a": b"first", "b": caption.data, "c": b"last"}.items():
        (data / f"{name}.png").write_bytes(good(random.Random(1)))
        (data / f"{name}.txt").write_bytes(content)

    def look() -> dict[str, list[str]]:
        source = opened(data)
        texts = [text for index in range(len(source)) for text in source.read(index).captions.values()]
        return {"texts": texts, "refused": [refusal.reason for refusal in source.refused]}

    found, grown = apart(look)
    if caption.verdict == ACCEPTED:
        assert found == {"texts": ["first", caption.clean, "last"], "refused": []}
    else:
        assert found == {"texts": ["first", "last"], "refused": [caption.verdict]}
    assert grown < 64 * MIB


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """A folder with what the paths of the records lead to."""
    data = tmp_path / "data"
    (data / "folder").mkdir(parents=True)
    (data / "good.png").write_bytes(good(random.Random(1)))
    (tmp_path / "secret.png").write_bytes(good(random.Random(2)))
    (data / "out.png").symlink_to(tmp_path / "secret.png")
    (data / "up").symlink_to(tmp_path)
    (data / "device").symlink_to("/dev/zero")
    os.mkfifo(data / "fifo")
    return data


def lines_of(middle: bytes) -> bytes:
    first, last = (json.dumps({"image": "good.png", "caption": text}).encode() for text in ("first", "last"))
    return b"\n".join((first, middle, last, b""))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_records(jsonl: Path, line: Any) -> None:
    (jsonl / "captions.jsonl").write_bytes(lines_of(line.data))

    def look() -> dict[str, Any]:
        source = opened(jsonl)
        pairs = [source.read(index) for index in range(len(source))]
        json.dumps([pair.metadata for pair in pairs], allow_nan=False)
        texts = [list(pair.captions.values()) for pair in pairs]
        return {"texts": texts, "refused": [(refusal.key, refusal.reason) for refusal in source.refused]}

    found, grown = apart(look)
    if line.verdict == ACCEPTED:
        assert found == {"texts": [["first"], [text_of(line)["caption"]], ["last"]], "refused": []}
    else:
        assert found == {"texts": [["first"], ["last"]], "refused": [["captions.jsonl:2", line.verdict]]}
    assert grown < 64 * MIB


@pytest.mark.parametrize("kind", malformed_tars.KINDS, ids=lambda kind: kind.name)
def test_tars(tmp_path: Path, kind: malformed_tars.TarKind) -> None:
    """A tar beside it, read after it, is whole whatever this one holds."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.tar").write_bytes(kind.make(random.Random(SEED)))
    (data / "1.tar").write_bytes(malformed_tars.plain(random.Random(SEED + 1)))
    before = sorted(path for path in tmp_path.rglob("*"))

    def look() -> dict[str, Any]:
        source = opened(data)
        return {"verdicts": verdicts(source), "refused": [refusal.reason for refusal in source.refused]}

    found, grown = apart(look)
    assert set(found["verdicts"].values()) == {ACCEPTED}
    names = [name.removeprefix("0/") for name in found["verdicts"] if name.startswith("0/")]
    assert {"1/first", "1/last"} <= set(found["verdicts"])
    assert set(kind.kept) <= set(names)
    if kind.verdict == ACCEPTED:
        assert not found["refused"]
    else:
        assert kind.verdict in found["refused"]
        assert set(names) <= set(kind.kept), "a bad sample was taken"
    assert grown < 64 * MIB
    assert sorted(path for path in tmp_path.rglob("*")) == before  # nothing is written, here or outside


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_names_give_keys_of_their_own(kind: str) -> None:
    keys = [listing.key_of(name) for name in NAMES[kind]]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", key) for key in keys)


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_names_as_files_and_as_members(tmp_path: Path, kind: str) -> None:
    """Through a folder, where the file system takes such names, and through a tar: nothing merges, nothing is lost."""
    data, packed = tmp_path / "data", tmp_path / "packed"
    packed.mkdir()
    names = [name for name in NAMES[kind] if len(name.encode()) < 250]
    for number, name in enumerate(names):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / f"{name}.png").write_bytes(good(random.Random(number)))
        (data / f"{name}.txt").write_text(f"number {number}")
    members = [
        (f"{name}{end}", data)
        for name in NAMES[kind]
        for end, data in ((".png", b"@"), (".txt", name.encode()))
    ]
    (packed / "0.tar").write_bytes(malformed_tars.sample(*members)(random.Random(1)))
    if names:
        source = opened(data)
        found = {source.read(index).metadata["source_name"] for index in range(len(source))}
        assert found == set(names) and not source.refused
        assert len(set(source.keys)) == len(names)
    source = opened(packed)
    found = {source.read(index).metadata["source_name"].removeprefix("0/") for index in range(len(source))}
    if kind == "dots":  # the first dot ends a key in a tar: refused by name, not mixed
        assert found == {"first", "last", "v1"}
        refused = [(refusal.key, refusal.reason) for refusal in source.refused]
        assert refused == [(f"0.tar/v1.{rest}", "sample_dotted_key") for rest in ("", "0", "1", "9")]
    else:
        assert found == {"first", "last", *NAMES[kind]} and not source.refused


def test_mixed_up_numbers_of_kinds() -> None:
    """The figures that docs/reliability.md gives."""
    counts = [len(kinds) for kinds in (malformed_images.KINDS, CAPTIONS, LINES, malformed_tars.KINDS, NAMES)]
    print(f"images, captions, records, tars, names: {counts}, {sum(counts)} kinds")
    assert counts[0] >= 26 and counts[1] >= 12 and counts[2] >= 12 and counts[3] >= 12 and counts[4] >= 10


def test_the_document_has_every_kind_and_its_verdict() -> None:
    text = DOCUMENT.read_text("utf-8")
    section = text.split("### Verdicts, kind by kind", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (image|caption|record|tar) \| `?(\w+)`? \| (.*) \|$", section, re.MULTILINE)
    written = {(what, verdict, kind) for what, verdict, kinds in rows for kind in kinds.split("; ")}
    built = {
        (what, kind.verdict, kind.name)
        for what, kinds in (
            ("image", malformed_images.KINDS),
            ("caption", CAPTIONS),
            ("record", LINES),
            ("tar", malformed_tars.KINDS),
        )
        for kind in kinds  # type: ignore[attr-defined]  # each has a name and a verdict
    }
    assert written == built


MUTANTS: dict[str, tuple[Any, str, Any, str, str]] = {
    "pixels are not counted": (images, "_check_size", lambda *_: None, "image", "1 x 1"),
    "formats are not told apart": (images, "_format_of", lambda _: "EPS", "image", "EPS"),
    "invisible text counts": (captions, "_visible", lambda _: True, "caption", "only zero-width characters"),
    "bytes are replaced": (
        captions,
        "decode_utf8",
        lambda raw: raw.decode("utf-8", "replace"),
        "caption",
        "GBK",
    ),
    "a field twice is the last": (listing, "_unique_keys", dict, "record", "field twice"),
    "any path is fine": (folder, "unsafe_name", lambda _: None, "record", "path with a line break"),
    "any member name is fine": (tars, "unsafe_name", lambda _: None, "tar", "name upwards"),
    "headers are believed": (
        tar_members.TarWalk,
        "_check_end",
        lambda _: None,
        "tar",
        "two archives in one",
    ),
    "links are files": (tar_members, "_kind", lambda *_: "file", "tar", "sparse file of 1 GiB"),
    "compressed ones are tars": (tar_members, "_COMPRESSED", (), "tar", "gzip"),
}


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_mutant_each_protection_is_needed(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without it the kind gets another verdict, or breaks; then the tests above fail."""
    where, attribute, mutant, what, kind = MUTANTS[name]
    monkeypatch.setattr(where, attribute, mutant)
    with pytest.raises((AssertionError, DataError)):
        if what == "image":
            (tmp_path / "x").mkdir()
            test_images(tmp_path / "x", next(k for k in malformed_images.KINDS if k.name == kind))
        elif what == "caption":
            (tmp_path / "x").mkdir()
            test_captions(tmp_path / "x", next(c for c in CAPTIONS if c.name == kind))
        elif what == "record":
            test_records(jsonl, next(line for line in LINES if line.name == kind))
        else:
            (tmp_path / "x").mkdir()
            test_tars(tmp_path / "x", next(k for k in malformed_tars.KINDS if k.name == kind))


def test_mutant_a_hang_and_a_leak_are_noticed() -> None:
    with pytest.raises(AssertionError, match="slower than 1 s"):
        apart(lambda: time.sleep(30), seconds=1)
    assert apart(lambda: len(bytearray(80 * 1024 * 1024)))[1] > 64 * MIB
    with pytest.raises(AssertionError, match="ended with -9"):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
def test_the_largest_accepted_picture_stays_in_its_memory() -> None:
    """64 Mpx of transparent pixels, the dearest kind: what a rank of the sharder needs beside its networks."""
    data = malformed_images.png(8000, 8000, depth=8, colour=6)
    _, grown = apart(lambda: images.open_image(data, RULES, MIN_SIDE).size, seconds=60)
    print(f"64 Mpx RGBA in {len(data)} bytes: {grown / MIB:.0f} MiB")
    assert grown < 640 * MIB
