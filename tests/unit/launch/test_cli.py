"""The command line: fast, torch-free, one sentence for each refusal, exit codes with a meaning."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cogview2.launch import cli
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory


def test_import_needs_no_torch_and_is_fast() -> None:
    code = (
        "import time, sys; begin = time.perf_counter(); import cogview2.launch.cli; "
        "took = time.perf_counter() - begin; "
        "assert not {'torch', 'deepspeed', 'numpy', 'cogview2.stages'} & set(sys.modules); print(took)"
    )
    best = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )
    assert best < 1.0  # wanted: 0.5 s; the margin is for a loaded machine


def test_a_bad_recipe_is_refused_in_under_two_seconds(tmp_path: Path) -> None:
    begin = time.monotonic()
    argv = [sys.executable, "-m", "cogview2.launch.cli", "run", "quickstart", "--set", "coglm.train.stpes=1"]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 78
    assert result.stderr == (
        "cogview2: --set coglm.train.stpes=1: unknown key 'coglm.train.stpes'; "
        "did you mean 'coglm.train.steps'?\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - begin < 4


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (["status", "nowhere"], 73, "no run 'nowhere'"),
        (["logs", "nowhere"], 73, "no run 'nowhere'"),
        (["run", "nosuch"], 78, "no recipe is named 'nosuch'"),
        (["run", "quickstart", "--stages", "x"], 78, "'x' is no stage"),
        (["run", "quickstart", "--name", "../x"], 78, "name is '../x'"),
    ],
)
def test_refusals(
    argv: list[str],
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == code
    error = capsys.readouterr().err
    assert error.startswith("cogview2: ") and expected in error and "Traceback" not in error


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["run"], ["run", "quickstart", "--steps", "3"]])
def test_usage_errors_are_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 64
    assert "usage: cogview2" in capsys.readouterr().err


def test_help_lists_only_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    built = set(cli.child_commands())
    for name in cli._CHILD_COMMANDS:
        assert (re.search(rf"^    {name}\b", text, re.MULTILINE) is not None) == (name in built)
    assert "doctor" in built
    assert "    submit " in text


def test_status_and_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("runs/demo")).create(load_recipe("quickstart", []))
    attempt = run.stage("train_vqvae").new_attempt()
    attempt.rank_log(1).write_text("line of rank 1\n")
    assert cli.main(["status"]) == 0
    assert "train_vqvae        interrupted" in capsys.readouterr().out
    assert cli.main(["logs", "demo", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "line of rank 1\n"


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python: writes its arguments to this file, and ends with 78; on SIGTERM with 75."""
    monkeypatch.chdir(tmp_path)
    words = tmp_path / "words"
    script = tmp_path / "python"
    script.write_text(
        f"""#!/bin/sh
for word; do echo "$word" >> {words}; done
case "$*" in *forever*) trap "exit 75" TERM; touch started; while :; do sleep 0.02; done;; esac
exit 78
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(cli.sys, "executable", str(script))
    monkeypatch.setattr(cli, "child_commands", lambda: dict.fromkeys(("generate", "weights"), "x"))
    return words


def test_a_child_command_gets_the_run_as_a_path_and_its_code_is_ours(child: Path) -> None:
    run = RunDirectory(Path("runs/demo")).create(load_recipe("quickstart", []))
    assert cli.main(["generate", "demo", "a red circle", "--count", "2"]) == 78
    module = "cogview2.stages.commands.generate"
    assert child.read_text().splitlines() == [
        "-P",
        "-m",
        module,
        str(run.path),
        "a red circle",
        "--count",
        "2",
    ]


def test_a_weights_folder_takes_the_place_of_a_run(child: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("folder")
    folder.mkdir()
    assert cli.main(["generate", "folder", "a red circle"]) == 73
    assert "no run 'folder'" in capsys.readouterr().err and not child.exists()
    (folder / "weights.json").write_text("{}")
    assert cli.main(["generate", "folder", "a red circle"]) == 78
    assert child.read_text().splitlines()[3:] == [str(folder.absolute()), "a red circle"]


def test_weights_take_any_first_word(child: Path) -> None:
    assert cli.main(["weights", "import", "--kind", "coglm"]) == 78
    assert child.read_text().splitlines()[3:] == ["import", "--kind", "coglm"]


def test_sigterm_is_handed_on_to_the_child(child: Path) -> None:
    def stop() -> None:
        while not Path("started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    assert cli.main(["weights", "forever"]) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
