"""What all commands share: codes, one sentence for a refusal, and a reader who leaves early."""

import subprocess
import sys

import pytest

from cogview2.pipeline.command_line import run_command
from cogview2.pipeline.errors import DataError, ExitCode


def test_the_code_is_that_of_the_work_or_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> ExitCode:
        raise DataError("no picture; name one")

    assert run_command("rank", lambda: ExitCode.DONE) == 0
    assert run_command("rank", lambda: ExitCode.REFUSED) == 78
    assert run_command("rank", refuse) == 78
    assert capsys.readouterr().err == "cogview2 rank: no picture; name one\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        run_command("rank", lambda: ExitCode(1 // 0))


def test_names_of_strangers_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> ExitCode:
        raise DataError("no \x1b[31mred\n name \u732b")

    assert run_command("rank", refuse) == 78
    assert capsys.readouterr().err == "cogview2 rank: no \\x1b[31mred\\n name \u732b\n"


def test_ctrl_c_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> ExitCode:
        raise KeyboardInterrupt

    assert run_command("weights import", interrupt) == 1
    assert capsys.readouterr().err == "cogview2 weights import: interrupted\n"


def test_a_reader_who_leaves_early_is_no_error() -> None:
    code = (
        "import sys\n"
        "from cogview2.pipeline.command_line import run_command\n"
        "from cogview2.pipeline.errors import ExitCode\n"
        "def work():\n"
        "    for number in range(100000): print(number)\n"
        "    return ExitCode.DONE\n"
        "sys.exit(run_command('rank', work))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"0\n"
        child.stdout.close()
        assert child.wait(60) == 0 and child.stderr.read() == b""
