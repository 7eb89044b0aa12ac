"""Latents of one step that the VQVAE's codes may move to: the same ones however ranks and micro batches share the batch.

Dims: B samples, H height, W width (pixels), E code dim, M latents, L latents of a sample, K candidates of a sample.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cogview2.pipeline.data.sample_plan import random_words
from cogview2.pipeline.training.modules import Batch


class CodeCandidates:
    """Equally many latents of each sample of a global batch, drawn by seed, step and the sample's place in the batch alone.

    A rank keeps those of its own samples; rank 0 gets all of them, in the order of the batch. So the table has the same rows
    in the same order on any number of ranks and of micro batches, within the rounding of the latents themselves.
    """

    def __init__(self, wanted: int, micro_batches: list[Batch], *, seed: int, step: int) -> None:
        """Begin a step.

        Args:
            wanted: candidates over all ranks, at least; fewer where the batch has no more latents.
            micro_batches: this rank's part of the step, {"pixels"}; every rank has equally many samples, in the order of
                `rank_slice`.
            seed: of the run.
            step: the update, from 0.
        """
        self._rank, self._ranks = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        share = sum(len(batch["pixels"]) for batch in micro_batches)
        self._of_a_sample = -(-wanted // (share * self._ranks))
        self._next = self._rank * share
        self._seed, self._step = seed, step
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def add(self, latents_ME: Tensor, pixels_BCHW: Tensor, rates: tuple[int, ...]) -> None:
        """Keep candidates of the next micro batch.

        Args:
            latents_ME: its latents, those of the first of `rates` first, of each rate sample after sample.
            pixels_BCHW: its pictures, of which only the shape counts.
            rates: pixels per latent, each way.
        """
        B, _, H, W = pixels_BCHW.shape
        parts = latents_ME.split([B * (H // rate) * (W // rate) for rate in rates])
        latents_BLE = torch.cat([part.view(B, -1, part.shape[-1]) for part in parts], dim=1)
        if latents_BLE.shape[1] > self._of_a_sample:
            chosen_BK = self._draws(B, latents_BLE.shape[1]).to(latents_BLE.device)
            latents_BLE = latents_BLE[torch.arange(B, device=chosen_BK.device)[:, None], chosen_BK]
        self._kept.append(latents_BLE.flatten(0, 1))
        self._next += B

    def _draws(self, samples: int, latents: int) -> Tensor:
        """Return which latents of the next samples are kept, int64 [B, K]."""
        rows = []
        for place in range(self._next, self._next + samples):
            words = random_words(latents, "code candidates", self._seed, self._step, place)
            rows.append(np.argsort(words, kind="stable")[: self._of_a_sample])
        return torch.from_numpy(np.stack(rows))

    @torch.no_grad()
    def on_first(self) -> Tensor | None:
        """Return the candidates of all ranks, float32 [M, E], on rank 0, and None elsewhere. Collective."""
        mine = torch.cat(self._kept).float().contiguous()
        if self._ranks == 1:
            return mine
        # Gathered by all, in a ring: one connection to rank 0 from each of hundreds would take gigabytes of buffers there.
        table_ME = mine.new_empty(self._ranks * len(mine), mine.shape[1])
        dist.all_gather(list(table_ME.chunk(self._ranks)), mine)
        return None if self._rank else table_ME
