"""What a checkpoint must agree with to be resumed, and the lock under which it is written."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from cogview2.pipeline.training.state.manifest import Manifest


class Fence(Protocol):
    """The lock under which this job works."""

    token: int

    def check(self) -> None:
        """Raise LockedError when another job has taken the lock over."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree with to be resumed."""

    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The values behind the fingerprint, by dotted key."""
    seed: int = 0

    def difference(self, manifest: Manifest) -> str:
        """Return in words what differs between the settings of a checkpoint and these, with the remedy."""
        old, new = manifest.settings, self.settings
        keys = [key for key in (*new, *(k for k in old if k not in new)) if old.get(key) != new.get(key)]
        if not keys:
            return "was trained from other inputs or by another version; restore them, or start a new run"
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        was, now = old.get(keys[0], "nothing"), new.get(keys[0], "nothing")
        return (
            f"was trained with {keys[0]} = {was}, this job has {now}{more}; restore the old value, or set the stage aside "
            "and train it anew with --restart-stale"
        )
