"""DeepSpeed JSON files (the "how" of a stage), found by name."""

import importlib.resources
from pathlib import Path

# The checkout root on sys.path would make this folder importable under a second name, as a second module object.
if __name__ != "cogview2.ds_configs":
    raise ModuleNotFoundError(f"import this package as 'cogview2.ds_configs', not as '{__name__}'")


def names() -> list[str]:
    """Return the names of the shipped DeepSpeed configurations, sorted."""
    folder = importlib.resources.files("cogview2.ds_configs")
    return sorted(Path(str(entry)).stem for entry in folder.iterdir() if str(entry).endswith(".json"))


def path(name: str) -> Path:
    """Return the file of the configuration `name`; raises KeyError naming those that exist."""
    if name not in names():
        raise KeyError(f"no DeepSpeed configuration {name!r}; there are: {', '.join(names())}")
    return Path(str(importlib.resources.files("cogview2.ds_configs").joinpath(f"{name}.json")))
