"""What importing and loading take in memory, measured in a process of its own, on files that are mostly holes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.weights.facts import CogLMFacts

MIB = 2**20
MEASURE = """
import json, sys
from pathlib import Path
from cogview2.stages.commands.weights import main
from cogview2.pipeline.weights.folder import WeightsFolder

def status(key):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(key))

def load(folder):
    model = WeightsFolder(Path(folder)).coglm()
    state = model.state_dict()
    assert not any(value.is_meta for value in state.values())
    assert all(float(value[:100].float().abs().max()) == 0 for value in state.values())

growths = []
for command in json.loads(sys.argv[1]):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    if command[0] == "load":
        before = status("RssAnon")
        load(command[1])
        growths.append(status("RssAnon") - before)
    else:
        before = status("VmRSS")
        assert main(command) == 0
        growths.append(status("VmHWM") - before)
print(json.dumps(growths), file=sys.stderr)
"""


def _shapes(rows: int) -> dict[str, tuple[int, ...]]:
    config = CogLMConfig(layers=2, hidden=1024, heads=16, max_positions=1024)
    with torch.device("meta"):
        state = CogLMFacts(config=config, rows=rows).build().state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def _sparse_file(path: Path, rows: int, form: str) -> int:
    """Write CogLM weights in float16 whose numbers are holes of the file; return its size."""
    shapes = _shapes(rows)
    path.with_suffix(".json").write_text(json.dumps({"num_attention_heads": 16}))
    if form == "torch":
        with torch.serialization.skip_data():
            torch.save({"module": {n: torch.empty(s, dtype=torch.float16) for n, s in shapes.items()}}, path)
        return path.stat().st_size
    header, at = {}, 0
    for name, shape in shapes.items():
        count = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    return path.stat().st_size


def _growths(commands: list[list[str]]) -> list[int]:
    """Run commands in one process; return by how many bytes each one's resident memory grew at its peak."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found: list[int] = json.loads(result.stderr.splitlines()[-1])
    return found


def _cut_in_two(folder: Path, rows: int) -> int:
    """Write two tensor-parallel parts whose numbers are holes; return the size of one."""
    (folder / "7").mkdir(parents=True)
    (folder / "latest").write_text("7")
    (folder / "model_config.json").write_text(json.dumps({"num_attention_heads": 16}))
    shapes = {name: list(shape) for name, shape in _shapes(rows).items()}
    for name, shape in shapes.items():
        if "query_key_value" in name or "dense_h_to_4h" in name or "word_embeddings" in name:
            shape[0] //= 2
        elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            shape[1] //= 2
    for rank in range(2):
        with torch.serialization.skip_data():
            module = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
            torch.save({"module": module}, folder / "7" / f"mp_rank_{rank:02d}_model_states.pt")
    return (folder / "7" / "mp_rank_00_model_states.pt").stat().st_size


@pytest.mark.parametrize("rows", [40_000, pytest.param(700_000, marks=pytest.mark.slow)])
def test_memory_does_not_follow_the_size_of_the_file(tmp_path: Path, rows: int) -> None:
    sizes = {form: _sparse_file(tmp_path / f"{form}.pt", rows, form) for form in ("torch", "safetensors")}
    sizes["parts"] = 2 * _cut_in_two(tmp_path / "parts.pt", rows)
    assert min(sizes.values()) > 2 * 1024 * rows
    commands = [
        ["import", "--kind", "coglm", str(tmp_path / f"{form}.pt"), str(tmp_path / form)] for form in sizes
    ]
    commands.append([*commands[2][:-1], str(tmp_path / "cast"), "--dtype", "float32"])
    commands.append(["load", str(tmp_path / "torch")])
    commands.append(["bundle", str(tmp_path / "torch"), str(tmp_path / "bundle")])
    commands.append(["load", str(tmp_path / "bundle")])
    growths = dict(zip([*sizes, "cast", "load", "bundle", "load .pt"], _growths(commands), strict=True))
    del growths["bundle"]  # written from a map of the file, whose pages count though they can be dropped
    assert max(growths.values()) < 64 * MIB, {
        name: f"{value / MIB:.0f} MiB" for name, value in growths.items()
    }
    assert (tmp_path / "cast" / "coglm.safetensors").stat().st_size > 2 * min(sizes.values()) - MIB
