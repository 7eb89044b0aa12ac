"""Folders of raw webdataset tars, as img2dataset writes them: <key>.jpg with <key>.txt and/or <key>.json."""

from pathlib import Path

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.listing import (
    PICTURE_EXTENSIONS,
    UNSUPPORTED_EXTENSIONS,
    Listing,
    Location,
    assemble,
    is_junk,
    unsafe_name,
)
from cogview2.pipeline.data.open_files import OpenFiles
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.data.tar_members import Member, walk_tar

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_tars(folder: Path) -> list[Path]:
    """Return the tar files right in `folder`, compressed ones too (they are refused by name), sorted."""
    paths = (path for path in folder.iterdir() if path.name.lower().endswith(_SUFFIXES))
    return sorted(path for path in paths if not is_junk(path.name) and path.is_file())


def split_name(name: str) -> tuple[str, str]:
    """Split a member name at the first dot of its last part: folder and key, lower-case extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


class _Shard:
    """The samples of one tar while its headers go by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: dict[str, dict[str, Location]] = {}
        self.refused: dict[str, RefusedError] = {}
        self.last: str | None = None
        self._links: set[str] = set()
        self._closed: set[str] = set()

    def add(self, member: Member) -> None:
        """File `member` under its sample, or note why not; a cut sample is forgotten, junk is ignored."""
        name = member.name.removeprefix("./").rstrip("/")
        if member.kind == "folder" or is_junk(name):
            return
        key, extension = split_name(name)
        self.last = key
        if member.kind == "cut":
            self._closed.add(key)
            self.samples.pop(key, None)
            return
        problem = self._problem(name, member)
        if problem is not None:
            self.refused.setdefault(key, problem)
            return
        parts = self.samples.setdefault(key, {})
        if extension in parts:
            # Nothing more goes in: a later caption may belong to the later picture of the same key.
            self._closed.add(key)
            detail = f"{name!r} stands twice; the first is kept"
            self.refused.setdefault(key + " (again)", RefusedError("duplicate_key", detail))
        if key not in self._closed:
            parts[extension] = Location(self.path, member.offset, member.size)

    def _problem(self, name: str, member: Member) -> RefusedError | None:
        unsafe = unsafe_name(name)
        if unsafe:
            return RefusedError("member_unsafe_name", f"{name!r} {unsafe}")
        if member.kind != "file":
            self._links.add(name)
            return RefusedError("member_not_regular", f"{name!r} is a link, device or sparse file")
        folders = name.split("/")[:-1]
        if any("/".join(folders[: depth + 1]) in self._links for depth in range(len(folders))):
            return RefusedError("member_not_regular", f"{name!r} lies below a link")
        return None


def _dotted(parts: dict[str, Location]) -> list[str]:
    """Return what stands between a first and a last dot and has a picture and a text of its own.

    `v1.0.jpg` and `v1.0.txt` are meant as a sample `v1.0`, but a key ends at its first dot: with all of `v1.0` to `v1.9`
    they would be one sample. A picture alone, such as `x.seg.png`, is a further file of sample `x`.
    """
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for between, dot, extension in (name.rpartition(".") for name in parts):
        picture = extension in PICTURE_EXTENSIONS | UNSUPPORTED_EXTENSIONS
        if dot and (picture or extension in ("txt", "json")):
            found[picture].add(between)
    return sorted(found[True] & found[False])


def _is_whole(parts: dict[str, Location], config: DataConfig, files: OpenFiles) -> bool:
    try:
        assemble("", parts, config, files)
    except RefusedError:
        return False
    return True


def _walk(shard: _Shard, listing: Listing, config: DataConfig, files: OpenFiles) -> None:
    try:
        for member in walk_tar(shard.path):
            shard.add(member)
    except RefusedError as error:
        listing.refuse(shard.path.name, error.reason, error.detail)
        if error.reason in ("shard_truncated", "shard_corrupt") and shard.last is not None:
            # The last sample may go on behind the fault; keep it only if it lacks nothing.
            if not _is_whole(shard.samples.get(shard.last, {}), config, files):
                shard.samples.pop(shard.last, None)
    except OSError as error:
        listing.refuse(shard.path.name, "shard_unreadable", str(error.strerror))
    else:
        if not shard.samples and not shard.refused:
            listing.refuse(shard.path.name, "shard_empty", "no member is a sample")


def list_tars(paths: list[Path], config: DataConfig) -> Listing:
    """List the samples of all tars, each read once, front to back, headers and texts only.

    A sample is known as <tar name without .tar>/<key>; a key's folder belongs to it.
    """
    listing = Listing("tars")
    with OpenFiles() as files:
        for path in paths:
            shard = _Shard(path)
            _walk(shard, listing, config, files)
            for key, problem in shard.refused.items():
                listing.refuse(f"{path.name}/{key}", problem.reason, problem.detail)
            for key, parts in shard.samples.items():
                if key in shard.refused:
                    continue
                for dotted in _dotted(parts):
                    detail = "a key ends at its first dot; rename the files, for example with _"
                    listing.refuse(f"{path.name}/{key}.{dotted}", "sample_dotted_key", detail)
                    parts = {
                        name: at for name, at in parts.items() if name.rpartition(".")[:2] != (dotted, ".")
                    }
                if not parts:
                    continue
                try:
                    name = f"{path.name.removesuffix('.tar')}/{key}"
                    listing.entries.append(assemble(name, parts, config, files))
                except RefusedError as error:
                    listing.refuse(f"{path.name}/{key}", error.reason, error.detail)
    return listing
