"""Numbers of training: means over ranks, metrics.jsonl and TensorBoard."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cogview2.pipeline import fsops


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum over all ranks; a new tensor."""
    total = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        backend = dist.get_backend()
        moved = total.cuda() if backend == "nccl" else total
        dist.all_reduce(moved)
        total = moved.to(values.device)
    return total


def gather_rows(row: torch.Tensor) -> torch.Tensor:
    """Return the rows [N] of all ranks as [ranks, N], in rank order, on every rank; on the device of `row`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return row[None].clone()
    moved = row.cuda() if dist.get_backend() == "nccl" else row
    rows = [torch.empty_like(moved) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, moved)
    return torch.stack(rows).to(row.device)


class MetricsWriter:
    """metrics.jsonl and TensorBoard of one model; used by rank 0 only."""

    def __init__(self, jsonl: Path, tensorboard: Path, resumed_step: int) -> None:
        """Append to both; lines after `resumed_step`, from steps that are trained again, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._jsonl, self._events = jsonl, tensorboard
        self._drop_after(resumed_step)
        with fsops.explained(tensorboard):
            self._board = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def _drop_after(self, step: int) -> None:
        if not self._jsonl.exists():
            return
        kept = []
        for line in self._jsonl.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed process may be torn
        fsops.write_text(self._jsonl, "".join(f"{line}\n" for line in kept))

    def scalars(self, step: int, values: dict[str, float], words: dict[str, str] | None = None) -> None:
        """Record the numbers of `step`, and what is said in words about it."""
        said = words or {}
        fsops.append_line(self._jsonl, json.dumps({"step": step} | values | said))
        with fsops.explained(
            self._events
        ):  # another thread writes: a full disk is told by one of the next calls
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            for name, text in said.items():
                self._board.add_text(name, text, step)

    def image(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """Record a uint8 picture [H, W, 3]."""
        with fsops.explained(self._events):
            self._board.add_image(name, pixels_HWC, step, dataformats="HWC")
            self._board.flush()

    def text(self, step: int, name: str, content: str) -> None:
        """Record a text."""
        with fsops.explained(self._events):
            self._board.add_text(name, content, step)

    def close(self) -> None:
        """Flush and close."""
        with fsops.explained(self._events):
            self._board.close()
