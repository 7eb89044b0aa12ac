"""Nothing that is read is executed, nothing that is written is open to others, and nothing is followed out of a run."""

import logging
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import small_shards
import source_scan
import yaml

from cogview2.launch import local
from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import redacted
from cogview2.pipeline.config import yaml_reader
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.errors import ConfigError, DataError, RunDirectoryError
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.stages.commands import web
from cogview2.stages.web.guard import is_loopback
from cogview2.stages.web.listener import listen

# -- code that is read ---------------------------------------------------------------------------------------------


def test_no_module_runs_what_it_reads() -> None:
    """No eval, shell, object YAML, unlimited pickle, nor webdataset with its decoders, anywhere in the product."""
    found = {
        path: calls
        for path, source in source_scan.modules().items()
        if (calls := source_scan.unsafe_calls(source))
    }
    # The published Inception network is a TorchScript file; its sha256 is compared before it counts as published.
    assert found == {"pipeline/metrics/inception_weights.py": ["torch.jit.load"]}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "import pickle",
        "from pickle import loads",
        "import webdataset as wds",
        "def f():\n    import webdataset",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_mutant_the_scan_sees_each_of_them(source: str) -> None:
    assert source_scan.unsafe_calls(source)


def test_the_scan_objects_to_nothing_safe() -> None:
    safe = (
        "torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\nmodel.eval()\nyaml.safe_dump(x)\n"
    )
    assert not source_scan.unsafe_calls(safe + "yaml.safe_load(x)\nsubprocess.run(['a'])\nimport pickletools")


WDS = """
import sys, webdataset, webdataset.utils, webdataset.autodecode
print(webdataset.utils.enforce_security)
for name, work in (
    ("pipe", lambda: list(webdataset.WebDataset("pipe:touch MARK", shardshuffle=False))),
    ("pickle", lambda: list(webdataset.autodecode.Decoder([webdataset.autodecode.basichandlers])(
        {"__key__": "a", "x.pyd": b"cposix\\nsystem\\n(S'touch MARK'\\ntR."}))),
):
    try:
        work()
    except Exception as error:
        print(name, type(error).__name__)
"""


def stock_reader(folder: Path, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WDS_")}
    done = subprocess.run(
        [sys.executable, "-c", WDS],
        cwd=folder,
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_the_ranks_environment_the_stock_reader_runs_nothing(tmp_path: Path) -> None:
    """WDS_SECURE is read when webdataset is imported, so that the launcher must have set it: whatever imports it."""
    variables = local.library_variables(1)
    assert variables["WDS_SECURE"] == "1"
    assert stock_reader(tmp_path, **variables).startswith("True\n")
    assert not (tmp_path / "MARK").exists()


def test_mutant_without_the_variable_it_does(tmp_path: Path) -> None:
    assert stock_reader(tmp_path).startswith("False\n")
    assert (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    "address", ["pipe:touch MARK", "http://x/{0..3}.tar", "s3://b/a.tar", "gs://b/a.tar", "hf://a"]
)
def test_addresses_are_refused_when_the_recipe_is_read(address: str) -> None:
    with pytest.raises(ConfigError, match="not a local path"):
        load_recipe("quickstart", [f"data.source={address}"])


# -- YAML ------------------------------------------------------------------------------------------------------------

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
YAML = {
    "duplicate": ("name: a\nname: b\n", "stands twice"),
    "duplicate, deep": ("coglm:\n  train:\n    steps: 1\n    steps: 2\n", "stands twice"),
    "alias bomb": (BOMB, "alias"),
    "merge key": ("a: &a {x: 1}\nb:\n  <<: *a\n", "alias"),
    "object": ("name: !!python/object/apply:os.system ['touch MARK']\n", "not valid YAML"),
    "name of an object": ("name: !!python/name:os.system ''\n", "not valid YAML"),
    "deep": ("x: " + "[" * 5000 + "]" * 5000, "nested deeper"),
    "large": ("# " + "x" * 1024 * 1024, "larger than"),
    "several documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
}


@pytest.mark.parametrize("kind", sorted(YAML))
def test_yaml_that_is_a_trick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, words = YAML[kind]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_recipe("./r.yaml", [])
    assert not (tmp_path / "MARK").exists()


def test_mutant_a_plain_loader_takes_the_tricks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert yaml.safe_load(YAML["duplicate"][0]) == {"name": "b"}
    monkeypatch.setattr(yaml_reader, "_refuse_tricks", lambda *_: None)
    assert yaml_reader.read_text("a: &a [1]\nb: *a\n", "x")[0] == {"a": [1], "b": [1]}


# -- files that are written ------------------------------------------------------------------------------------------

WRITERS = {
    "pipeline/fsops.py",
    "pipeline/leases.py",  # a lease is created, not replaced
    "pipeline/locking.py",  # a lock file is never replaced
    "pipeline/attempt.py",  # heartbeats: every few seconds, no sync
    "pipeline/distributed/watchdog.py",  # stacks of a rank that may hang in fsops
    "pipeline/training/preemption.py",  # in a signal handler
    "pipeline/sampling/meter.py",  # /proc
    "pipeline/weights/bundle.py",  # into names that fsops.staged gave
    "pipeline/weights/exporting.py",
    "pipeline/weights/importing.py",  # removes what it staged
    "pipeline/weights/writer.py",
    "launch/process.py",  # the log of a child process
    "launch/preflight.py",  # tokens of a look at the hosts
    "launch/slurm.py",
    "ops/local_attention/build.py",  # a cache outside any run; ops knows nothing of the pipeline
}


def test_only_few_modules_change_files_by_themselves() -> None:
    found = {path for path, source in source_scan.modules().items() if source_scan.file_changes(source)}
    assert found <= WRITERS, f"use fsops: {sorted(found - WRITERS)}"


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "p.open('x')",
        "p.write_text('')",
        "os.replace(a, b)",
        "os.open(p, os.O_WRONLY | os.O_CREAT)",
        "shutil.rmtree(p)",
        "path.unlink()",
        "path.rename(b)",
    ],
)
def test_mutant_the_scan_sees_each_change(source: str) -> None:
    assert source_scan.file_changes(source)


def test_the_scan_lets_fsops_and_readers_through() -> None:
    assert not source_scan.file_changes(
        "fsops.write_text(p, '')\nopen(p)\nopen(p, 'rb')\nos.open(p, os.O_RDONLY)"
    )


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


def too_open(folder: Path) -> dict[str, str]:
    """Return what others than owner and group can reach, or the group can change."""
    return {name: oct(mode) for name, mode in modes(folder).items() if mode & 0o027}


def write_a_run(folder: Path) -> RunDirectory:
    """Make the files of a run in all the ways that there are: by fsops, by logging and by libraries."""
    run = RunDirectory(folder / "runs" / "a").create(load_recipe("quickstart", []))
    stage = run.stage("pretrain_coglm").create()
    attempt = stage.new_attempt()
    attempt.write_commands([["python", "-m", "x"]], {"A": "1"})
    handler = logging.FileHandler(attempt.rank_log(0))
    handler.close()
    with run.lock("test"), open(attempt.launcher_log, "ab"):
        small_shards.build(stage.output / "train")
    fsops.append_line(stage.metrics, "{}")
    (stage.tensorboard / "events").mkdir()
    (stage.tensorboard / "events" / "out.1").write_bytes(b"x")
    return run


@pytest.fixture
def lax_umask() -> object:
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_files_are_the_owners_and_his_groups(tmp_path: Path, lax_umask: object) -> None:
    fsops.restrict_umask()
    run = write_a_run(tmp_path)
    assert not too_open(tmp_path)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o750
    assert stat.S_IMODE(run.recipe_path.stat().st_mode) == 0o640


def test_mutant_without_the_umask_libraries_write_for_all(tmp_path: Path, lax_umask: object) -> None:
    run = write_a_run(tmp_path)
    assert f"{run.path.relative_to(tmp_path)}/stages/pretrain_coglm/attempts/0001/rank-0.log" in too_open(
        tmp_path
    )


def test_a_stricter_umask_stays() -> None:
    before = os.umask(0o077)
    try:
        fsops.restrict_umask()
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)


@pytest.mark.parametrize("module", ["stages/_runner.py", "launch/cli.py", "launch/agent.py"])
def test_every_process_of_ours_restricts_itself(module: str) -> None:
    names = [name for name, _ in source_scan.calls(source_scan.modules()[module])]
    assert names.count("fsops.restrict_umask") == 1


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_a_secret_of_the_recipe_stands_in_no_file_that_others_read(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["launch.environment.HF_TOKEN=hush-hush", "launch.environment.A=b"])
    run = RunDirectory(tmp_path / "run").create(recipe)
    attempt = run.stage("train_vqvae").create().new_attempt()
    attempt.write_commands([["x"]], recipe.launch.environment)
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]
    assert holding == [run.recipe_path] and stat.S_IMODE(run.recipe_path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "PGPASSWORD",
        "DB_PWD",
        "GOOGLE_CREDENTIALS",
        "my_auth",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert redacted({name: "hush"}) == {name: "(redacted)"}


# -- listeners -------------------------------------------------------------------------------------------------------


def test_the_page_is_this_machines_alone() -> None:
    arguments = web._parse(["run"])
    assert is_loopback(arguments.host)
    with listen(arguments.host, 0) as server:
        assert is_loopback(server.getsockname()[0])
        with (
            pytest.raises(OSError),
            socket.create_connection(("127.0.0.2", server.getsockname()[1]), timeout=5),
        ):
            pass


def test_tensorboard_is_written_for_and_never_served(tmp_path: Path) -> None:
    """No module starts its server, no document binds it to the world, and the writer opens no port."""
    for path, source in source_scan.modules().items():
        assert not {"tensorboard.program", "tensorboard.main"} & source_scan.imports(source), path
    for document in (*(source_scan.ROOT / "docs").rglob("*.md"), source_scan.ROOT / "README.md"):
        assert not re.search(r"bind_all|--host[ =]0\.0\.0\.0", document.read_text("utf-8")), document
    from cogview2.pipeline.training.metrics import MetricsWriter

    before = _listening()
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    writer.scalars(1, {"loss": 1.0})
    assert _listening() == before
    writer.close()


def _listening() -> int:
    """Count the listening TCP sockets of this process."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue  # the one that lists the folder
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return sum(row[3] == "0A" and row[9] in inodes for row in rows)


# -- links -----------------------------------------------------------------------------------------------------------


def test_a_run_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run = RunDirectory(tmp_path / "run").create(load_recipe("quickstart", []))
    assert run.exists() and (tmp_path / "disk" / "recipe.yaml").is_file()


def test_links_inside_a_run_are_not_followed(tmp_path: Path) -> None:
    """What is written replaces a link instead of following it, or is refused."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.json", "metrics.jsonl", "shard.tar"):
        (folder / name).symlink_to(victim)
    fsops.write_json(folder / "a.json", {})
    with fsops.staged(folder / "shard.tar") as temporary:
        temporary.write_bytes(b"x")
    assert not (folder / "a.json").is_symlink() and not (folder / "shard.tar").is_symlink()
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        fsops.append_line(folder / "metrics.jsonl", "{}")
    (tmp_path / "target").mkdir()
    (folder / ".staging.step_1").symlink_to(tmp_path / "target")
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        fsops.make_dirs(folder / ".staging.step_1")
    fsops.discard(folder / ".staging.step_1")
    assert victim.read_text() == "precious" and (tmp_path / "target").is_dir()


def test_a_linked_shard_is_refused(tmp_path: Path) -> None:
    small_shards.build(tmp_path / "train")
    shard = tmp_path / "train" / "train-000001.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    shard.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(DataError, match=r"train-000001\.tar is a symbolic link"):
        ShardIndex.load(tmp_path / "train")


def test_mutant_a_writer_that_follows(tmp_path: Path) -> None:
    """The plain way of Python, which fsops must not take."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "link").write_text("{}")
    assert (tmp_path / "victim").read_text() == "{}"
