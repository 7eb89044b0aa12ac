"""Training of the VQVAE: reconstruction losses at three rates, EMA codebook over all ranks (spec 1.3)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from cogview2.pipeline.config.stages import VQVAEStageConfig
from cogview2.pipeline.models.vqvae.losses import build_perceptual, l1_loss, ms_ssim_loss
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.models.vqvae.quantizer import Float32Buffers, far_rows
from cogview2.pipeline.training.metrics import sum_over_ranks
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.train_modules.code_candidates import CodeCandidates

_INIT_LATENTS_PER_CODE = 32
"""Latents per code, over the global batch, from which the codebook is initialised."""
_RESTART_LATENTS_PER_CODE = 8
"""Latents per code that may be restarted, over the global batch, among which its new place is looked for."""
_LEAST_RESTART_LATENTS = 4096
"""At least so many, however few the codes: badly served latents are rare."""


class _CodeUse(Float32Buffers):
    """How long each code was not used, and the running share of use; part of the checkpoint, not of the weights."""

    idle_steps: torch.Tensor
    recent: torch.Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.register_buffer("idle_steps", torch.zeros(codes))
        self.register_buffer("recent", torch.zeros(codes))


class VQVAETrainModule(TrainModule):
    """Batches: {"pixels": float [B, 3, H, W] in [0, 1]}."""

    model: VQVAE
    metric_names = ("l1_rate4", "l1_rate8", "l1_rate16", "ms_ssim", "perceptual", "commitment")

    def __init__(self, config: VQVAEStageConfig, seed: int, rate: int = RATES[0]) -> None:
        """Build it.

        Args:
            config: sizes, losses and codebook training.
            seed: of the codebook's draws.
            rate: the rate that the cascade uses, trained in every step.
        """
        super().__init__()
        self.config, self.seed, self.rate = config, seed, rate
        self.model = VQVAE(config.model)
        self.use = _CodeUse(config.model.codebook_size)
        self.perceptual = build_perceptual(config.perceptual_network)
        self._quantize = config.autoencoder_steps == 0
        self._has_codebook = False
        self._rates: tuple[int, ...] = RATES
        self._counts: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._candidates: CodeCandidates | None = None

    def start_from(self, trained: VQVAE) -> None:
        """Go on from the weights of `trained`, same sizes: its codebook is kept, and there is no warm-up without it."""
        self.model.load_state_dict(trained.state_dict())
        self._has_codebook = self._quantize = True

    def forward(self, batch: Batch) -> LossOutput:
        """Return the weighted sum of the losses, summed over the rates of this step."""
        # Convolutions run a third faster on CPUs in this layout; weights must keep theirs for DeepSpeed.
        pixels_BCHW = batch["pixels"].contiguous(memory_format=torch.channels_last)
        output = self.model(pixels_BCHW, quantize=self._quantize, rates=self._rates)
        weights = self.config.loss
        terms: list[torch.Tensor] = []
        # Added up on the device: reading a number here would wait for the kernels.
        sums = dict.fromkeys(self.metric_names, pixels_BCHW.new_zeros(()))
        counts = dict.fromkeys(self.metric_names, 0)

        def add(name: str, value: torch.Tensor, weight: float) -> None:
            terms.append(weight * value)
            sums[name] = sums[name] + value.detach()
            counts[name] += 1

        for rate, picture in output.reconstructions.items():
            add(f"l1_rate{rate}", l1_loss(picture, pixels_BCHW), weights.l1)
            if weights.l2:
                terms.append(weights.l2 * (picture - pixels_BCHW).square().mean())
            if weights.ms_ssim:
                add("ms_ssim", ms_ssim_loss(picture, pixels_BCHW), weights.ms_ssim)
            if weights.perceptual:
                add("perceptual", self.perceptual(picture, pixels_BCHW), weights.perceptual)
        add("commitment", output.commitment, weights.commitment)
        counts["commitment"] = len(output.reconstructions)
        if self._quantize:
            self._count(output.latents, output.codes)
            if self._candidates is not None:
                self._candidates.add(output.latents, pixels_BCHW, self._rates)
        loss = torch.stack(terms).sum()
        return LossOutput(loss, torch.stack(list(sums.values())), torch.tensor(list(counts.values())))

    def _count(self, latents_ME: torch.Tensor, codes_M: torch.Tensor) -> None:
        counts, sums = self.model.quantizer.statistics(latents_ME, codes_M)
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums

    def begin_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Switch quantization on after the warm-up, with a codebook from the latents of this very step."""
        self._counts = self._sums = self._candidates = None
        self._quantize = self._has_codebook or step >= self.config.autoencoder_steps
        self._rates = RATES if step % self.config.other_rates_every == 0 else (self.rate,)
        if step == self.config.autoencoder_steps and not self._has_codebook:
            self._initialize_codebook(step, micro_batches)
        limit = self.config.restart_after
        if self._quantize and limit:
            # Only these can be over the limit after this step; known on all ranks, and most steps have none.
            near = int((self.use.idle_steps >= limit).sum())
            if near:
                wanted = max(_LEAST_RESTART_LATENTS, _RESTART_LATENTS_PER_CODE * near)
                self._candidates = CodeCandidates(wanted, micro_batches, seed=self.seed, step=step)

    @torch.no_grad()
    def _initialize_codebook(self, step: int, micro_batches: list[Batch]) -> None:
        wanted = _INIT_LATENTS_PER_CODE * self.config.model.codebook_size
        candidates = CodeCandidates(wanted, micro_batches, seed=self.seed, step=step)
        for batch in micro_batches:
            candidates.add(self.model(batch["pixels"], quantize=False).latents, batch["pixels"], RATES)
        latents_ME = candidates.on_first()
        if latents_ME is not None:
            self.model.quantizer.initialize(latents_ME, torch.Generator().manual_seed(self.seed))
        self._from_rank_zero(*self.model.quantizer.buffers())

    @staticmethod
    def _from_rank_zero(*tensors: torch.Tensor) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """Return the weights of the rates that this step does not train."""
        for index, rate in enumerate(RATES):
            if rate not in self._rates:
                yield from self.model.decoder(rate).parameters()
                if index and rate > max(self._rates):
                    yield from self.model.down_samplers[index - 1].parameters()

    @torch.no_grad()
    def end_step(self, step: int) -> dict[str, float]:
        """Update the codebook from the statistics of all ranks, and restart codes that nobody uses."""
        if self._counts is None or self._sums is None:
            return {}
        quantizer = self.model.quantizer
        packed = sum_over_ranks(torch.cat([self._counts[:, None], self._sums], dim=1))
        counts, sums = packed[:, 0], packed[:, 1:]
        quantizer.ema_update(counts, sums, self.config.ema_decay)
        self.use.idle_steps.copy_(torch.where(counts > 0, 0, self.use.idle_steps + 1))
        self.use.recent.mul_(0.9).add_(counts, alpha=0.1)
        dead = self.use.idle_steps > self.config.restart_after
        restarted = int(dead.sum()) if self._candidates is not None else 0
        if self._candidates is not None and restarted:
            self._restart(step, dead, self._candidates)
        self._candidates = None
        share, perplexity = quantizer.usage(self.use.recent)
        return {
            "codebook_used": share,
            "codebook_perplexity": perplexity,
            "codes_restarted": float(restarted),
        }

    def _restart(self, step: int, dead_n: torch.Tensor, candidates: CodeCandidates) -> None:
        """Move the codes of `dead_n` (bool [n]) to badly served latents of the global batch. Collective."""
        quantizer = self.model.quantizer
        replacements_nE = quantizer.embed.weight.clone()
        latents_ME = candidates.on_first()
        if latents_ME is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = far_rows(latents_ME, int(dead_n.sum()), generator, quantizer.embed.weight)
            replacements_nE[dead_n.nonzero()[: len(rows), 0]] = latents_ME[rows.to(latents_ME.device)]
        self._from_rank_zero(replacements_nE)
        quantizer.restart(dead_n, replacements_nE)
        self.use.idle_steps[dead_n] = 0
