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
        self._latents: torch.Tensor | None = None

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
        loss = torch.stack(terms).sum()
        return LossOutput(loss, torch.stack(list(sums.values())), torch.tensor(list(counts.values())))

    def _count(self, latents_ME: torch.Tensor, codes_M: torch.Tensor) -> None:
        counts, sums = self.model.quantizer.statistics(latents_ME, codes_M)
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums
        self._latents = latents_ME

    def begin_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Switch quantization on after the warm-up, with a codebook from the latents of this very step."""
        self._counts = self._sums = self._latents = None
        self._quantize = self._has_codebook or step >= self.config.autoencoder_steps
        self._rates = RATES if step % self.config.other_rates_every == 0 else (self.rate,)
        if step == self.config.autoencoder_steps and not self._has_codebook:
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
