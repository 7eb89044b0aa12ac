"""The hand-written package list, the wheel, and the guards against a second import name."""

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


@pytest.mark.slow
def test_a_wheel_holds_every_module_recipe_and_json(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    subprocess.run([*argv, "--wheel-dir", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("cogview2-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for pattern in ("*.py", "*.yaml", "*.json")
        for path in (ROOT / folder).rglob(pattern)
    ]
    assert expected
    assert {f"cogview2/{path.as_posix()}" for path in expected} <= names
    assert not [name for name in names if name.startswith("tests")]
