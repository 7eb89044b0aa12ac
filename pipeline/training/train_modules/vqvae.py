"""Training of the VQVAE: reconstruction losses at three rates, EMA codebook over all ranks (spec 1.3)."""

import torch
import torch.distributed as dist

from cogview2.pipeline.config.stages import VQVAEStageConfig
from cogview2.pipeline.models.vqvae.losses import build_perceptual, l1_loss, ms_ssim_loss
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.models.vqvae.quantizer import Float32Buffers, far_rows
from cogview2.pipeline.training.metrics import sum_over_ranks
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule

_INIT_LATENTS_PER_CODE = 32
"""Latents per code, over all ranks, from which the codebook is initialised."""


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

    def __init__(self, config: VQVAEStageConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.model = VQVAE(config.model)
        self.use = _CodeUse(config.model.codebook_size)
        self.perceptual = build_perceptual(config.perceptual_network)
        self._quantize = config.autoencoder_steps == 0
        self._counts: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._latents: torch.Tensor | None = None

    def forward(self, batch: Batch) -> LossOutput:
        """Return the weighted sum of the losses, summed over the rates."""
        # Convolutions run a third faster on CPUs in this layout; weights must keep theirs for DeepSpeed.
        pixels_BCHW = batch["pixels"].contiguous(memory_format=torch.channels_last)
        output = self.model(pixels_BCHW, quantize=self._quantize)
        weights = self.config.loss
        pictures = list(output.reconstructions.values())
        nothing = pixels_BCHW.new_zeros(len(RATES))
        l1 = torch.stack([l1_loss(picture, pixels_BCHW) for picture in pictures])
        ssim = torch.stack([ms_ssim_loss(p, pixels_BCHW) for p in pictures]) if weights.ms_ssim else nothing
        perceptual = (
            torch.stack([self.perceptual(p, pixels_BCHW) for p in pictures])
            if weights.perceptual
            else nothing
        )
        l2 = (
            torch.stack([(picture - pixels_BCHW).square().mean() for picture in pictures])
            if weights.l2
            else nothing
        )
        terms = weights.l1 * l1 + weights.l2 * l2 + weights.ms_ssim * ssim + weights.perceptual * perceptual
        loss = terms.sum() + weights.commitment * output.commitment
        if self._quantize:
            self._count(output.latents, output.codes)
        sums = torch.stack([*l1, ssim.mean(), perceptual.mean(), output.commitment / len(RATES)]).detach()
        return LossOutput(loss, sums, torch.ones_like(sums))

    def _count(self, latents_ME: torch.Tensor, codes_M: torch.Tensor) -> None:
        counts, sums = self.model.quantizer.statistics(latents_ME, codes_M)
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums
        self._latents = latents_ME

    def begin_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Switch quantization on after the warm-up, with a codebook from the latents of this very step."""
        self._counts = self._sums = self._latents = None
        self._quantize = step >= self.config.autoencoder_steps
        if step == self.config.autoencoder_steps:
            self._initialize_codebook(micro_batches)

    @torch.no_grad()
    def _initialize_codebook(self, micro_batches: list[Batch]) -> None:
        latents = torch.cat(
            [self.model(batch["pixels"], quantize=False).latents for batch in micro_batches]
        ).float()
        world = dist.get_world_size() if dist.is_initialized() else 1
        generator = torch.Generator().manual_seed(self.seed)
        wanted = min(len(latents), -(-_INIT_LATENTS_PER_CODE * self.config.model.codebook_size // world))
        latents = latents[torch.randperm(len(latents), generator=generator)[:wanted].to(latents.device)]
        if world > 1:
            everybodys = [torch.empty_like(latents) for _ in range(world)]
            dist.all_gather(everybodys, latents.contiguous())
            latents = torch.cat(everybodys)
        self.model.quantizer.initialize(latents, generator)
        self._from_rank_zero(*self.model.quantizer.buffers())

    @staticmethod
    def _from_rank_zero(*tensors: torch.Tensor) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def end_step(self, step: int) -> dict[str, float]:
        """Update the codebook from the statistics of all ranks, and restart codes that nobody uses."""
        if self._counts is None or self._sums is None or self._latents is None:
            return {}
        quantizer = self.model.quantizer
        packed = sum_over_ranks(torch.cat([self._counts[:, None], self._sums], dim=1))
        counts, sums = packed[:, 0], packed[:, 1:]
        quantizer.ema_update(counts, sums, self.config.ema_decay)
        self.use.idle_steps.copy_(torch.where(counts > 0, 0, self.use.idle_steps + 1))
        self.use.recent.mul_(0.9).add_(counts, alpha=0.1)
        dead = self.use.idle_steps > self.config.restart_after
        restarted = int(dead.sum()) if self.config.restart_after else 0
        if restarted:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = far_rows(self._latents.float(), restarted, generator, quantizer.embed.weight)
            replacements = quantizer.embed.weight.clone()
            replacements[dead.nonzero()[: len(rows), 0]] = self._latents[
                rows.to(self._latents.device)
            ].float()
            self._from_rank_zero(replacements)
            quantizer.restart(dead, replacements)
            self.use.idle_steps[dead] = 0
        share, perplexity = quantizer.usage(self.use.recent)
        return {
            "codebook_used": share,
            "codebook_perplexity": perplexity,
            "codes_restarted": float(restarted),
        }
