"""The hand-written package list, the wheel, and the guards against a second import name."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pipeline", "stages", "ops", "launch", "ds_configs")


def packages_on_disk() -> set[str]:
    found = {
        init.parent.relative_to(ROOT) for folder in FOLDERS for init in (ROOT / folder).rglob("__init__.py")
    }
    return {"cogview2." + ".".join(path.parts) for path in found}


def test_the_package_list_is_the_folders_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk()


def test_every_module_is_in_a_package() -> None:
    for folder in FOLDERS:
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module} is in a folder without __init__.py"


def test_every_package_is_typed() -> None:
    for folder in FOLDERS:
        assert (ROOT / folder / "py.typed").is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_second_import_name_is_refused(folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert (
        f"ModuleNotFoundError: import this package as 'cogview2.{folder}', not as '{folder}'" in result.stderr
    )


def checkout(folder: Path) -> Path:
    """Copy what a build needs into `folder`."""
    folder.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
    return folder


def build_wheel(source: Path, out: Path, **variables: str) -> Path:
    """Build the checkout's wheel with only the given build variables set; return its path."""
    argv = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DS_BUILD_") and name != "TORCH_CUDA_ARCH_LIST"
    }
    subprocess.run(
        [*argv, "--wheel-dir", str(out), str(source)], env={**environment, **variables}, check=True
    )
    (wheel,) = out.glob("cogview2-*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_holds_every_module_recipe_json_and_source(tmp_path: Path) -> None:
    wheel = build_wheel(checkout(tmp_path / "checkout"), tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for pattern in ("*.py", "*.yaml", "*.json", "*.h", "*.cpp", "*.cu", "*.cuh")
        for path in (ROOT / folder).rglob(pattern)
    ]
    assert expected
    assert {f"cogview2/{path.as_posix()}" for path in expected} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".so")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_an_ahead_of_time_build_needs_no_compiler_later(tmp_path: Path) -> None:
    source = checkout(tmp_path / "checkout")
    wheel = build_wheel(source, tmp_path / "built", DS_BUILD_LOCAL_ATTENTION="1")
    assert "-py3-none-linux" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    folder = tmp_path / "site" / "cogview2" / "ops" / "local_attention"
    for ending in ("so", "json"):
        assert (folder / f"local_attention_cpu.{ending}").is_file()
    code = (
        "from cogview2.ops.local_attention import build; print(build.__file__)\n"
        "assert build.missing('cpu') is None, build.missing('cpu')\n"
        "print(build.state('cpu')); build.load('cpu')"
    )
    environment = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(tmp_path / "site")}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    module, state = result.stdout.splitlines()
    assert Path(module) == folder / "build.py"
    assert state == f"installed ahead of time: {folder / 'local_attention_cpu.so'}"
    assert not (tmp_path / "extensions").exists()
    # The next ordinary wheel of the same checkout stays pure.
    pure = build_wheel(source, tmp_path / "pure")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]


@pytest.mark.slow
def test_an_ahead_of_time_build_that_was_asked_for_by_name_must_succeed(tmp_path: Path) -> None:
    source = checkout(tmp_path / "checkout")
    with pytest.raises(subprocess.CalledProcessError):
        build_wheel(source, tmp_path / "named", DS_BUILD_LOCAL_ATTENTION="1", CXX="/no/such/c++")
    build_wheel(source, tmp_path / "all", DS_BUILD_OPS="1", CXX="/no/such/c++")
    build_wheel(source, tmp_path / "none", DS_BUILD_OPS="1", DS_BUILD_LOCAL_ATTENTION="0", CXX="/no/such/c++")
