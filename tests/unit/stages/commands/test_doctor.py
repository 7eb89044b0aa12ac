"""The doctor command: one report of the machine, and an exit code that says whether stages can run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from cogview2.ops.local_attention import build, toolchain  # noqa: E402
from cogview2.stages.commands import _machine_report, doctor  # noqa: E402


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.our_logging, "setup", lambda: None)


def test_the_command_line_shows_our_op_beside_those_of_deepspeed(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "cogview2.launch.cli", "doctor"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for label in ("cogview2", "python", "torch", "deepspeed", "C++", "nvcc", "GPU"):
        assert any(re.match(rf"{re.escape(label)} +\S", line) for line in lines), label
    ours = lines[lines.index("local attention") + 1 :]
    assert re.match(r"  cpu +(will be built|built: |installed ahead|cannot be built: )", ours[0])
    assert re.match(r"  cuda +(will be built|built: |installed ahead|cannot be built: )", ours[1])
    assert [line for line in ours if line.startswith("local_attention ..")]
    assert [line for line in ours if line.startswith("cpu_adam ..")]
    assert list(tmp_path.iterdir()) == []  # nothing is built unless asked for


def test_build_compiles_what_the_machine_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(build, "load", built.append)
    monkeypatch.setattr(_machine_report, "show_versions", lambda: None)
    monkeypatch.setattr(_machine_report, "show_operators", lambda: None)
    monkeypatch.setattr(toolchain, "no_device", lambda: "no CUDA device is visible")
    assert doctor.main([]) == 0 and built == []
    assert doctor.main(["--build"]) == 0 and built == ["cpu"]
    monkeypatch.setattr(toolchain, "no_device", lambda: None)
    assert doctor.main(["--build"]) == 0 and built == ["cpu", "cpu", "cuda"]


def test_a_failed_build_is_one_sentence_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Any:
        raise build.BuildError("no C++ compiler was found (g++); install g++, or set CXX to one")

    monkeypatch.setattr(build, "load", fail)
    monkeypatch.setattr(toolchain, "no_device", lambda: "no CUDA device is visible")
    assert doctor.main(["--build"]) == 1
    output = capsys.readouterr()
    assert "local_attention .." in output.out
    assert output.err.endswith(
        "cogview2 doctor: no C++ compiler was found (g++); install g++, or set CXX to one\n"
    )


def test_without_deepspeed_nothing_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert doctor.main([]) == 1
    assert capsys.readouterr().err.startswith(
        "cogview2 doctor: deepspeed cannot be imported (ModuleNotFoundError"
    )


def test_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--repair"])
    assert stop.value.code == 64
