"""Calls in the product's source, found in its syntax trees: what must stand in few places, or nowhere."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pipeline", "stages", "launch", "ops", "ds_configs")


def modules() -> dict[str, str]:
    """Return path below the checkout -> source, of every module of the product."""
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield (dotted name as written, call); `?` stands for an expression."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield _dotted(node.func), node


def imports(source: str) -> set[str]:
    """Return every module that is imported, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _constant(call: ast.Call, name: str) -> object:
    return next(
        (k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None
    )


def unsafe_calls(source: str) -> list[str]:
    """Name calls that run what they read: code, shell lines, pickles that are not limited, YAML with objects."""
    found: list[str] = []
    for name, call in calls(source):
        last = name.rpartition(".")[2]
        if (
            name in ("eval", "exec", "os.system", "os.popen", "torch.jit.load", "os.execvp", "__import__")
            or _constant(call, "shell") is True
            or (name in ("torch.load",) and _constant(call, "weights_only") is not True)
            or (
                last in ("read_array", "load")
                and name[:2] == "np"
                and _constant(call, "allow_pickle") is not False
            )
            or (name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"))
            or (name.startswith(("pickle.", "marshal.", "shelve.", "cloudpickle.", "dill.")))
        ):
            found.append(name)
    for module in imports(source):
        if module.partition(".")[0] in (
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "cloudpickle",
            "joblib",
            "webdataset",
        ):
            found.append(f"import {module}")
    return found


_WRITERS = {
    "write_text",
    "write_bytes",
    "touch",
    "unlink",
    "rename",
    "rmdir",
    "hardlink_to",
    "symlink_to",
    "mkdir",
}
_MODULES = ("os", "shutil")
_FUNCTIONS = {
    *(
        "replace",
        "rename",
        "renames",
        "unlink",
        "remove",
        "rmdir",
        "link",
        "symlink",
        "truncate",
        "ftruncate",
    ),
    *("fsync", "fdatasync", "mkdir", "makedirs", "rmtree", "move", "copy", "copy2", "copyfile", "copytree"),
}


def _opens_for_writing(name: str, call: ast.Call) -> bool:
    if name == "open" or name.endswith(".open"):
        mode = _constant(call, "mode")
        place = 1 if name == "open" else 0
        if mode is None and len(call.args) > place and isinstance(call.args[place], ast.Constant):
            mode = call.args[place].value  # type: ignore[attr-defined]  # a constant, as asked
        if (
            isinstance(mode, str)
            and set(mode) & set("wax+")
            and name.partition(".")[0] not in ("tarfile", "Image")
        ):
            return True
    return name == "os.open" and any("O_CREAT" in ast.dump(argument) for argument in call.args)


def file_changes(source: str) -> list[str]:
    """Name calls that create, change, rename or delete files, without those of fsops."""
    found = []
    for name, call in calls(source):
        owner, _, last = name.rpartition(".")
        plain = owner in _MODULES and last in _FUNCTIONS
        path_like = owner not in ("fsops", *_MODULES, "") and last in _WRITERS
        if plain or path_like or _opens_for_writing(name, call):
            found.append(name)
    return found
