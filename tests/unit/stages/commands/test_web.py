"""The command line of the page: what is refused before anything is loaded or served."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogview2.stages.commands import web


def test_without_the_extra_there_is_one_sentence_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nicegui" else real(name))
    assert web.main(["somewhere"]) == 78
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and "pip install 'cogview2[web]'" in output.err


@pytest.mark.parametrize("port", ["x", "-1", "65536", "8080.0", "\N{ARABIC-INDIC DIGIT EIGHT}"])
def test_what_is_no_port_is_a_usage_error(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        web.main(["somewhere", f"--port={port}"])
    assert caught.value.code == 64 and "65535" in capsys.readouterr().err


def test_importing_the_command_needs_nothing_of_the_extra() -> None:
    code = "import sys, cogview2.stages.commands.web; print([m for m in ('nicegui', 'uvicorn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_a_host_of_another_machine_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert web.main([str(tmp_path), "--host", "192.0.2.1", "--port", "0"]) == 78
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "192.0.2.1" in output.err and "--host" in output.err


def test_a_host_that_others_reach_brings_a_warning_and_a_missing_run_is_refused_without_an_address(
    tmp_path: Path,
) -> None:
    pytest.importorskip("nicegui", reason="needs the extra web: pip install 'cogview2[web]'")
    argv = [sys.executable, "-m", "cogview2.stages.commands.web", str(tmp_path / "none")]
    environment = dict(os.environ) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*argv, "--host", "0.0.0.0", "--port", "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    warning, refusal = done.stderr.splitlines()
    assert "warning: 0.0.0.0 can be reached from other machines" in warning
    assert refusal.startswith("cogview2 web: ") and "none" in refusal
    assert done.returncode in (73, 78) and done.stdout == ""
