"""Options and fixtures shared by all tests."""

import signal
from pathlib import Path

import hypothesis
import pytest
import tiny_runs

from cogview2.pipeline.run_dir import RunDirectory

# A shell starts jobs in the background with SIGINT ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("cogview2", deadline=None)
hypothesis.settings.load_profile("cogview2")


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest's own --fixtures lists fixtures; it stays reachable as --funcargs. Name the folder `tests` after
    # DIR on the command line: pytest reads its arguments once before this file is loaded.
    parser.optparser.conflict_handler = "resolve"
    group = parser.getgroup("cogview2")
    group.addoption(
        "--fixtures",
        dest="fixtures_dir",
        metavar="DIR",
        type=lambda text: Path(text).absolute(),  # a test may change the working directory
        help="folder that holds golden/ and data/",
    )


@pytest.fixture(scope="session")
def fixtures(request: pytest.FixtureRequest) -> Path:
    """The folder of reference tensors and data sets; tests that need it are skipped without it."""
    folder: Path | None = request.config.getoption("fixtures_dir")
    if folder is None:
        pytest.skip("needs --fixtures DIR, a folder that holds golden/ and data/")
    missing = [name for name in ("golden", "data") if not (folder / name).is_dir()]
    if missing:
        pytest.skip(f"--fixtures {folder} does not hold {' and '.join(missing)}")
    return folder.resolve()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tiny_runs.Finished:
    """A whole tiny cascade, made by the real command line; copy it (tiny_runs.copy), never write to it."""
    return tiny_runs.run_cascade(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def sharded_run(finished_run: tiny_runs.Finished, tmp_path: Path) -> RunDirectory:
    """A copy of the finished run up to its shards."""
    return tiny_runs.copy(finished_run.run, tmp_path / "sharded", until="shard_dataset")
