"""The shared vector quantizer: nearest code, straight-through gradient, moving-average codebook (spec 1.3).

Dims: B batch, H height, W width, E code dim, M latents, n codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogview2.pipeline.errors import ConfigError

LAPLACE_EPS = 1e-5
_DRAW_ROUNDS = 16
RESTARTED_CLUSTER_SIZE = 1.0
COPY_NOISE = 0.1
DISTANCES_PER_CHUNK = 2**26
"""Numbers of one [M, n] float32 block of distances: 256 MiB."""


class Float32Buffers(nn.Module):
    """A module whose own buffers follow a change of device but never of dtype.

    `module.bfloat16()` casts floating buffers too, and a moving average in bfloat16 stops moving: an update
    of less than 0.4 % of the value is rounded away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        own = super()._apply
        own(keep_dtype, recurse=False)
        return self


class Codebook(Float32Buffers):
    """The table of codes; a buffer, because engines cast and average every parameter."""

    weight: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(size, channels).uniform_(-1 / size, 1 / size))


@dataclass(frozen=True)
class Quantized:
    """What the quantizer makes of one feature map."""

    vectors: Tensor
    """[B, E, H, W] for the decoder: codes with the gradient passed straight through, or the latents."""
    commitment: Tensor
    """float32 scalar: mean squared distance from the latents to their codes (constant)."""
    latents: Tensor
    """[M, E] projected latents in raster order, cut off from the graph."""
    codes: Tensor
    """int64 [M]; empty without quantization."""


class VectorQuantizer(Float32Buffers):
    """1x1 projection, then the nearest of n codes in squared L2; codes are exponential moving averages."""

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, latent_channels: int, codebook_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, latent_channels, 1)
        self.embed = Codebook(codebook_size, latent_channels)
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed_avg", self.embed.weight.clone())

    @property
    def size(self) -> int:
        """Number of codes n."""
        return self.embed.weight.shape[0]

    def project(self, features_BEHW: Tensor) -> Tensor:
        """Return the latents [B, H, W, E] of encoder features [B, E, H, W]."""
        return self.proj(features_BEHW).permute(0, 2, 3, 1)

    @torch.no_grad()
    def nearest(self, latents_ME: Tensor) -> Tensor:
        """Return the int64 code [M] nearest to each latent [M, E], computed in float32 in bounded memory."""
        codes_M, _ = _nearest(latents_ME, self.embed.weight)
        return codes_M

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the float32 code vectors [..., E] of int64 codes [...]."""
        return self.embed.weight[codes]

    def forward(self, features_BEHW: Tensor, quantize: bool = True) -> Quantized:
        """Quantize encoder features.

        Args:
            features_BEHW: encoder features of one rate.
            quantize: False passes the projected latents on, commitment 0, no codes (autoencoder warm-up).
        """
        latents_BHWE = self.project(features_BEHW)
        latents_ME = latents_BHWE.reshape(-1, latents_BHWE.shape[-1])
        if not quantize:
            return Quantized(
                vectors=latents_BHWE.permute(0, 3, 1, 2),
                commitment=torch.zeros((), device=latents_ME.device),
                latents=latents_ME.detach(),
                codes=torch.empty(0, dtype=torch.int64, device=latents_ME.device),
            )
        codes_M = self.nearest(latents_ME)
        vectors_ME = self.lookup(codes_M)
        commitment = (vectors_ME - latents_ME.float()).square().mean()
        # Written so that the value is exactly the code: the usual z + (code - z) rounds.
        through_ME = vectors_ME.to(latents_ME.dtype) + (latents_ME - latents_ME.detach())
        return Quantized(
            vectors=through_ME.view(latents_BHWE.shape).permute(0, 3, 1, 2),
            commitment=commitment,
            latents=latents_ME.detach(),
            codes=codes_M,
        )

    @torch.no_grad()
    def statistics(self, latents_ME: Tensor, codes_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return how often each code was used [n] and the sum of its latents [n, E], float32.

        Pure and additive: the statistics of a batch are the sum of those of its parts, so ranks add theirs.
        """
        counts_n = torch.bincount(codes_M, minlength=self.size).to(torch.float32)
        sums_nE = torch.zeros(self.size, latents_ME.shape[1], device=latents_ME.device)
        return counts_n, sums_nE.index_add_(0, codes_M, latents_ME.float())

    @torch.no_grad()
    def ema_update(self, counts_n: Tensor, sums_nE: Tensor, decay: float) -> None:
        """Move the codebook by one step of exponential moving averages (spec 1.3).

        Args:
            counts_n: uses of each code over the global batch.
            sums_nE: sums of the latents of each code over the global batch.
            decay: share of the old averages that is kept, in (0, 1).
        """
        self.cluster_size.mul_(decay).add_(counts_n.float(), alpha=1 - decay)
        self.embed_avg.mul_(decay).add_(sums_nE.float(), alpha=1 - decay)
        total = self.cluster_size.sum()
        smoothed_n = (self.cluster_size + LAPLACE_EPS) / (total + self.size * LAPLACE_EPS) * total
        # A code never used has no average: the formula would divide its start value by the smoothing alone.
        ever_n1 = (self.cluster_size > 0)[:, None]
        self.embed.weight.copy_(torch.where(ever_n1, self.embed_avg / smoothed_n[:, None], self.embed.weight))

    @torch.no_grad()
    def restart(self, dead_n: Tensor, replacements_nE: Tensor) -> None:
        """Set the codes chosen by `dead_n` (bool [n]) to their rows of `replacements_nE`; the others stay.

        Raises:
            ConfigError: `replacements_nE` has not one row for each code.
        """
        if replacements_nE.shape != self.embed.weight.shape:
            raise ConfigError(
                f"replacements must have one row for each code, {list(self.embed.weight.shape)}, "
                f"not {list(replacements_nE.shape)}; fill the rows of living codes with anything"
            )
        dead_n1 = dead_n[:, None]
        fresh_nE = replacements_nE.float()
        self.embed.weight.copy_(torch.where(dead_n1, fresh_nE, self.embed.weight))
        self.embed_avg.copy_(torch.where(dead_n1, fresh_nE * RESTARTED_CLUSTER_SIZE, self.embed_avg))
        self.cluster_size.masked_fill_(dead_n, RESTARTED_CLUSTER_SIZE)

    @torch.no_grad()
    def initialize(
        self, latents_ME: Tensor, generator: torch.Generator | None = None, iterations: int = 5
    ) -> None:
        """Place the codes on data: distinct latents far apart, then Lloyd iterations; the averages start there.

        A code left without latents (a copy, where many latents are equal) moves to a badly served latent.

        Args:
            latents_ME: projected latents; fewer than n are repeated with noise.
            generator: source of all chance; by default one with seed 0, so that equal latents give the same
                codebook on every rank.
            iterations: Lloyd iterations.

        Raises:
            ConfigError: there are no latents, or they have another code dim.
        """
        code_dim = self.embed.weight.shape[1]
        if latents_ME.ndim != 2 or not len(latents_ME) or latents_ME.shape[1] != code_dim:
            raise ConfigError(
                f"latents must be [M, {code_dim}] with M >= 1, not {list(latents_ME.shape)}; "
                "pass VQVAEOutput.latents of at least one batch"
            )
        latents_ME = latents_ME.float()
        generator = generator or torch.Generator().manual_seed(0)
        self.embed.weight.copy_(_draw_rows(latents_ME, self.size, generator))
        for _ in range(iterations):
            codes_M, distances_M = _nearest(latents_ME, self.embed.weight)
            counts_n, sums_nE = self.statistics(latents_ME, codes_M)
            self.embed.weight.copy_(
                torch.where(
                    counts_n[:, None] > 0, sums_nE / counts_n.clamp(min=1)[:, None], self.embed.weight
                )
            )
            empty = (counts_n == 0).nonzero()[:, 0][: len(latents_ME)]
            farthest = distances_M.topk(len(empty)).indices
            self.embed.weight[empty] = latents_ME[farthest]
        # Not the counts: a code of flat background would start with a weight of thousands, and lag behind the
        # encoder for hundreds of steps.
        self.cluster_size.fill_(RESTARTED_CLUSTER_SIZE)
        self.embed_avg.copy_(self.embed.weight * RESTARTED_CLUSTER_SIZE)

    @staticmethod
    def usage(counts_n: Tensor) -> tuple[float, float]:
        """Return the share of codes used at all and the perplexity exp(entropy) of their use (1 to n).

        Without any use both are 0.
        """
        counts_n = counts_n.double()
        total = counts_n.sum()
        if total <= 0:
            return 0.0, 0.0
        share_n = counts_n / total
        entropy = -torch.xlogy(share_n, share_n).sum()
        return (counts_n > 0).double().mean().item(), entropy.exp().item()


def _nearest(latents_ME: Tensor, table_nE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int64 index [M] of the nearest row and its squared distance [M], in float32."""
    table_nE = table_nE.float()
    squares_n = table_nE.square().sum(dim=1)
    codes, distances = [], []
    # Autocast would run the product in half precision, and codes at the border would flip.
    with torch.autocast(device_type=latents_ME.device.type, enabled=False):
        for part_ME in latents_ME.split(max(1, DISTANCES_PER_CHUNK // len(table_nE))):
            part_ME = part_ME.float()
            relative_M, codes_M = torch.addmm(squares_n, part_ME, table_nE.T, alpha=-2).min(dim=1)
            codes.append(codes_M)
            distances.append(relative_M + part_ME.square().sum(dim=1))
    return torch.cat(codes), torch.cat(distances)


def far_rows(
    latents_ME: Tensor, count: int, generator: torch.Generator, chosen_nE: Tensor | None = None
) -> Tensor:
    """Draw up to `count` distinct latents, int64 [<= count], mostly far from those drawn before and from `chosen_nE`.

    The draws of k-means++ in a few rounds: probability by squared distance. Drawn evenly, most codes would fall on
    the flat background that most latents are, and its tiny variations would become codes of their own.
    """
    drawn: list[Tensor] = []
    table_nE = chosen_nE if chosen_nE is not None else latents_ME[:0]
    left = min(count, len(latents_ME))
    per_round = max(1, -(-left // _DRAW_ROUNDS))
    while left > 0:
        weights_M = (
            _nearest(latents_ME, table_nE)[1] if len(table_nE) else latents_ME.new_ones(len(latents_ME))
        )
        weights_M = weights_M.float().clamp(min=torch.finfo(torch.float32).tiny).cpu()
        for rows in drawn:
            weights_M[rows] = 0
        # Exponential races: the largest of weight / Exp(1) are draws without replacement.
        races_M = torch.empty(len(weights_M)).exponential_(generator=generator)
        rows = (weights_M.double() / races_M.double()).topk(min(per_round, left)).indices
        drawn.append(rows)
        table_nE = torch.cat([table_nE, latents_ME[rows.to(latents_ME.device)]])
        left -= len(rows)
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64)


def _draw_rows(latents_ME: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` latents without repetition, see `far_rows`; where there are too few, copies with a little noise."""
    device = generator.device
    rows = far_rows(latents_ME, count, generator)
    missing = count - len(rows)
    drawn_nE = latents_ME[rows.to(latents_ME.device)]
    if not missing:
        return drawn_nE
    repeated = torch.randint(len(latents_ME), (missing,), generator=generator, device=device)
    noise = torch.randn(missing, latents_ME.shape[1], generator=generator, device=device)
    scale = latents_ME.std(dim=0, correction=0).clamp(min=torch.finfo(torch.float32).eps)
    copies_nE = latents_ME[repeated.to(latents_ME.device)] + COPY_NOISE * scale * noise.to(latents_ME.device)
    return torch.cat([drawn_nE, copies_nE])
