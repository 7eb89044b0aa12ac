"""What a power loss may leave on a disk: recorded file operations, replayed in a model of a file system.

The model is the one that portable programs must assume: the content of a file is safe after its fsync, the names in a folder
after the fsync of the folder. Anything else may be there or not after a crash, each on its own; content that was not synced
may be missing, cut in half, or zeros. A rename itself is atomic.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cogview2.pipeline import fsops

LIMIT = 400
"""States of one moment, at most; drawn at random where there are more."""


@dataclass(eq=False)
class Node:
    """A file or a folder."""

    content: bytes | None = None  # None: a folder
    synced: bool = False
    names: dict[str, "Node"] = field(default_factory=dict)
    """Of a folder, as running programs see it."""
    durable: dict[str, "Node"] = field(default_factory=dict)
    """Of a folder, as the disk surely has it."""


@dataclass(frozen=True)
class Operation:
    """One recorded operation; `content` is that of the file at that moment."""

    kind: str
    path: Path
    target: Path | None
    content: bytes | None


@dataclass(frozen=True, eq=False)
class _Change:
    """A change of names that no fsync has made durable yet."""

    folders: tuple[Node, ...]
    drop: tuple[Node, str] | None
    add: tuple[Node, str, Node] | None

    def apply(self, names: dict[int, dict[str, Node]]) -> None:
        if self.drop is not None:
            names.setdefault(id(self.drop[0]), dict(self.drop[0].durable)).pop(self.drop[1], None)
        if self.add is not None:
            folder, name, node = self.add
            names.setdefault(id(folder), dict(folder.durable))[name] = node


Tree = dict[Path, bytes | None]
"""Path below the root -> content; None for a folder."""


@contextmanager
def recording(root: Path) -> Iterator[list[Operation | str]]:
    """Record the operations below `root`; the caller may append words of its own (what was acknowledged)."""
    found: list[Operation | str] = []

    def note(kind: str, path: Path, target: Path | None) -> None:
        if path.is_relative_to(root):
            seen = target if target is not None else path
            content = seen.read_bytes() if kind in ("create", "append") else None
            found.append(Operation(kind, path, target, content))

    before, fsops.recorder = fsops.recorder, note
    try:
        yield found
    finally:
        fsops.recorder = before


class Disk:
    """Replays operations."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Node()
        self.pending: list[_Change] = []

    def _find(self, path: Path) -> Node:
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names[name]
        return node

    def _change(self, drop: tuple[Node, str] | None, add: tuple[Node, str, Node] | None) -> None:
        if drop is not None:
            drop[0].names.pop(drop[1], None)
        if add is not None:
            add[0].names[add[1]] = add[2]
        folders = tuple({id(part[0]): part[0] for part in (drop, add) if part is not None}.values())
        self.pending.append(_Change(folders, drop, add))

    def do(self, operation: Operation) -> None:
        """Carry an operation out."""
        path, parent = operation.path, operation.path.parent
        if operation.kind == "mkdir":
            self._change(None, (self._find(parent), path.name, Node()))
        elif operation.kind in ("create", "append"):
            known = self._find(parent).names.get(path.name)
            if known is not None:
                known.content, known.synced = operation.content, False
            else:
                self._change(None, (self._find(parent), path.name, Node(operation.content)))
        elif operation.kind == "fsync":
            self._find(path).synced = True
        elif operation.kind == "rename":
            assert operation.target is not None
            node, target = self._find(path), operation.target
            self._change((self._find(parent), path.name), (self._find(target.parent), target.name, node))
        elif operation.kind == "unlink":
            if path.name in self._find(parent).names:
                self._change((self._find(parent), path.name), None)
        elif operation.kind == "fsync_dir":
            self._sync(self._find(path))
        else:
            raise AssertionError(operation)

    def _sync(self, folder: Node) -> None:
        left = []
        for change in self.pending:
            if folder in change.folders:
                names: dict[int, dict[str, Node]] = {}
                change.apply(names)
                for known in change.folders:
                    known.durable = names[id(known)]
            else:
                left.append(change)
        self.pending = left

    def states(self, rng: random.Random) -> Iterator[Tree]:
        """Yield what may be left if the power fails now."""
        for chosen in self._subsets(rng):
            names: dict[int, dict[str, Node]] = {}
            for change in chosen:
                change.apply(names)
            torn = self._torn(self.top, names)
            versions = [("whole", "nothing", "half", "zeros") for _ in torn]
            choices = itertools.product(*versions)
            if 4 ** len(torn) > 8:
                choices = iter({tuple(rng.choice(v) for v in versions) for _ in range(8)})
            for choice in choices:
                tree: Tree = {}
                kept = {id(node): how for node, how in zip(torn, choice, strict=True)}
                self._collect(self.top, Path(), names, kept, tree)
                yield tree

    def _subsets(self, rng: random.Random) -> Iterator[list[_Change]]:
        count = len(self.pending)
        if 2**count <= LIMIT // 4:
            masks = range(2**count)
        else:
            masks = {0, 2**count - 1} | {rng.getrandbits(count) for _ in range(LIMIT // 4)}  # type: ignore[assignment]
        for mask in masks:
            yield [change for bit, change in enumerate(self.pending) if mask >> bit & 1]

    def _torn(self, node: Node, names: dict[int, dict[str, Node]]) -> list[Node]:
        if node.content is not None:
            return [] if node.synced else [node]
        found = [
            torn for child in names.get(id(node), node.durable).values() for torn in self._torn(child, names)
        ]
        return list({id(torn): torn for torn in found}.values())

    def _collect(
        self, node: Node, path: Path, names: dict[int, dict[str, Node]], kept: dict[int, str], tree: Tree
    ) -> None:
        for name, child in names.get(id(node), node.durable).items():
            if child.content is None:
                tree[path / name] = None
                self._collect(child, path / name, names, kept, tree)
            else:
                tree[path / name] = _after_crash(child.content, kept.get(id(child), "whole"))


def _after_crash(content: bytes, how: str) -> bytes:
    return {
        "whole": content,
        "nothing": b"",
        "half": content[: len(content) // 2],
        "zeros": bytes(len(content)),
    }[how]


def write_tree(tree: Tree, folder: Path) -> None:
    """Make the files of a state."""
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def crash_states(
    root: Path, recorded: list[Operation | str], seed: int = 0
) -> Iterator[tuple[list[str], Tree]]:
    """Yield (what was acknowledged by then, state) for a crash after each operation; equal states once for each moment."""
    disk, acknowledged, rng = Disk(root), [], random.Random(seed)
    for item in recorded:
        if isinstance(item, str):
            acknowledged.append(item)
            continue
        disk.do(item)
        seen: set[tuple[tuple[str, bytes | None], ...]] = set()
        for tree in disk.states(rng):
            key = tuple(sorted((str(path), content) for path, content in tree.items()))
            if key not in seen and len(seen) < LIMIT:
                seen.add(key)
                yield list(acknowledged), tree
