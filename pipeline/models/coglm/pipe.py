"""CogLM as a DeepSpeed PipelineModule: the same blocks cut into pipe stages, with one tied word embedding.

Layers: 0 word embeddings (tied), 1 positions, 2 .. L+1 blocks, L+2 final layer norm, L+3 head (tied).
Between layers travel tuples of the hidden states and the int64 inputs still needed; every pipe stage makes its
mask from the roles, once per micro batch. The head hands the hidden states and the tied matrix to the loss, which
makes logits only where there is a loss.
"""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.coglm.loss import PART_NAMES, LabelRanges, coglm_loss
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.visibility import visibility_of
from cogview2.pipeline.models.not_finite import spoil_gradient
from cogview2.pipeline.models.transformer.block import Block
from cogview2.pipeline.models.transformer.init import Embedding, seeded
from cogview2.pipeline.models.transformer.norm import LayerNorm

logger = logging.getLogger(__name__)
TIED_KEY = "word_embeddings"
_FIRST_BLOCK = 2
_PREFIX = "transformer."

HiddenAndWords = tuple[torch.Tensor, torch.Tensor]
Targets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PipeWords(Embedding):
    """First layer: (tokens, position ids, roles) -> (word embeddings, position ids, roles).

    It has one weight, because only the listed weight of a tied module is reduced between its owners.
    """

    def __init__(self, config: CogLMConfig, rows: int, seed: int) -> None:
        with seeded(seed):
            super().__init__(rows, config.hidden, config.init_std)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:  # type: ignore[override]  # a pipe layer takes one tuple
        """Look the tokens up; all inputs int64 [B, S]."""
        tokens_BS, position_ids_BS, roles_BS = inputs
        return super().forward(tokens_BS), position_ids_BS, roles_BS


class PipePositions(nn.Module):
    """(word embeddings, position ids, roles) -> (hidden, roles)."""

    def __init__(self, config: CogLMConfig, seed: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        with seeded(seed):
            self.position_embeddings = Embedding(config.max_positions, config.hidden, config.init_std)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the position embeddings, then dropout."""
        words_BSD, position_ids_BS, roles_BS = inputs
        hidden_BSD = words_BSD + self.position_embeddings(position_ids_BS)
        return F.dropout(hidden_BSD, self.dropout, self.training), roles_BS


class PipeBlock(Block):
    """(hidden, roles) -> (hidden, roles)."""

    def __init__(self, config: CogLMConfig, seed: int) -> None:
        with seeded(seed):
            super().__init__(config)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]  # a pipe layer takes one tuple
        """Run the layer under the mask of the roles."""
        hidden_BSD, roles_BS = inputs
        mask = visibility_of(roles_BS).mask_for(self.attention, hidden_BSD.dtype)
        return super().forward(hidden_BSD, lambda x_BSD: self.attention(x_BSD, mask)), roles_BS


class PipeFinalNorm(LayerNorm):
    """(hidden, roles) -> normed hidden."""

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]  # a pipe layer takes one tuple
        """Drop the roles; no mask is needed any more."""
        return super().forward(inputs[0])


def _expose_head(words: PipeWords, hidden_BSD: torch.Tensor) -> HiddenAndWords:
    # A view: DeepSpeed's hooks leave leaves out, and would clear the gradient of a leaf after the loss has given it one.
    return hidden_BSD, words.weight.view_as(words.weight)


class PipeLoss:
    """Loss of the last pipe stage; keeps the split of the last micro batch for the engine to average."""

    def __init__(self, ranges: LabelRanges) -> None:
        self.ranges = ranges
        self.mass: torch.Tensor | None = None
        """What the weighted sum of a micro batch is divided by; set before every step, see training/normalisation.py."""
        self.parts: OrderedDict[str, torch.Tensor] = OrderedDict(
            (f"{name}_{kind}", torch.zeros(())) for kind in ("loss_sum", "labels") for name in PART_NAMES
        )

    def __call__(self, outputs: HiddenAndWords, targets: Targets) -> torch.Tensor:
        """Return the loss of (hidden [B, S, D], words [V, D]) against (labels, loss mask, loss weights) [B, S]."""
        labels_BS, loss_mask_BS, loss_weights_BS = targets
        parts = coglm_loss(*outputs, labels_BS, loss_mask_BS, self.ranges, loss_weights_BS, self.mass)
        values = torch.cat([parts.sums, parts.counts])
        self.parts = OrderedDict(zip(self.parts, values.unbind(), strict=True))
        spoil_gradient(parts.loss)
        return parts.loss


class CogLMPipe(PipelineModule):
    """PipelineModule with given bounds, that also reports the split of the loss, the same keys on every pipe stage."""

    def _partition_layers(self, method: Sequence[int]) -> None:  # bounds in place of the name of a method
        self.parts = list(method)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])
        if self.global_rank == 0:
            counts = ", ".join(str(stop - start) for start, stop in itertools.pairwise(self.parts))
            logger.info("layers of each pipe stage (words, positions, blocks, norm, head): %s", counts)

    def get_additional_losses(self) -> OrderedDict[str, torch.Tensor] | None:
        """Return {image,english,chinese}_loss_sum and {image,english,chinese}_labels.

        DeepSpeed averages each over micro batches and data parallel ranks; the ratio of the two is then the
        global mean of that kind. None when the loss function keeps no split.
        """
        return self.loss_fn.parts if isinstance(self.loss_fn, PipeLoss) else None


def _layer_seeds(config: CogLMConfig, init_seed: int) -> list[int]:
    """Return the seed of each layer that draws weights: words, positions, blocks."""
    count = config.layers + _FIRST_BLOCK
    return [init_seed * count + layer for layer in range(count)]


def init_as_pipe(
    model: CogLM, init_seed: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Give a plain CogLM the fresh weights that `build_pipeline_module` draws from `init_seed`.

    Only one layer at a time is held in float32 on the CPU, so the model may come without any storage.

    Args:
        model: of any device, meta too.
        init_seed: of the draws.
        device: where the weights go; by default where the model is.
        dtype: to which they are rounded; by default that of the model.
    """
    config, words = model.config, model.transformer.word_embeddings
    seeds = _layer_seeds(config, init_seed)
    for layer in range(config.layers + _FIRST_BLOCK + 1):
        if layer == 0:
            drawn: nn.Module = PipeWords(config, words.num_embeddings, seeds[0])
        elif layer == 1:
            drawn = PipePositions(config, seeds[1])
        else:
            drawn = PipeBlock(config, seeds[layer]) if layer < len(seeds) else PipeFinalNorm(config)
        for inner, parameter in drawn.named_parameters():
            owner, _, name = _to_plain(layer, inner, config).rpartition(".")
            module = model.get_submodule(owner)
            old = module.get_parameter(name)
            value = parameter.detach().to(device=device or old.device, dtype=dtype or old.dtype)
            module.register_parameter(name, nn.Parameter(value, requires_grad=old.requires_grad))


def build_pipeline_module(
    config: CogLMConfig,
    rows: int,
    num_stages: int,
    loss_fn: Callable[[HiddenAndWords, Targets], torch.Tensor],
    *,
    bounds: Sequence[int],
    activation_checkpoint_interval: int = 0,
    init_seed: int = 0,
) -> CogLMPipe:
    """Build this rank's share of CogLM. The process group must exist.

    Micro batches are ((tokens, position_ids, roles), (labels, loss_mask, loss_weights)), each [B, S].

    Args:
        config: sizes.
        rows: rows of the word embeddings.
        num_stages: pipe stages; divides the world size.
        loss_fn: usually a `PipeLoss`; gets ((hidden, words), (labels, loss mask, loss weights)).
        bounds: of the pipe stages, see config/partition.py.
        activation_checkpoint_interval: layers recomputed together in the backward pass; 0 recomputes none.
        init_seed: the fresh weights depend on it alone, not on the number of pipe stages or on the rank.
    """
    # DeepSpeed's own layer seeding is not used: it reseeds every forward pass too, so dropout would repeat on
    # all data parallel ranks and after a resume, and its default function fails on numpy integers.
    seeds = _layer_seeds(config, init_seed)
    words = dict(config=config, rows=rows, seed=seeds[0])
    layers = [
        # No forward_fn here: DeepSpeed writes a tied module to layer files only where it is called itself.
        TiedLayerSpec(TIED_KEY, PipeWords, **words),
        LayerSpec(PipePositions, config, seeds[1]),
        *(LayerSpec(PipeBlock, config, seed) for seed in seeds[_FIRST_BLOCK:]),
        LayerSpec(PipeFinalNorm, config),
        TiedLayerSpec(TIED_KEY, PipeWords, forward_fn=_expose_head, **words),
    ]
    return CogLMPipe(
        layers=layers,
        num_stages=num_stages,
        loss_fn=loss_fn,
        partition_method=bounds,
        activation_checkpoint_interval=activation_checkpoint_interval,
        # The reentrant default silently loses gradients when a segment's inputs are all integers.
        activation_checkpoint_func=non_reentrant_checkpoint,
    )


def _to_plain(layer: int, name: str, config: CogLMConfig) -> str:
    if layer == 0:
        return f"{_PREFIX}word_embeddings.{name}"
    if layer == 1:
        return f"{_PREFIX}{name}"
    if layer < _FIRST_BLOCK + config.layers:
        return f"{_PREFIX}layers.{layer - _FIRST_BLOCK}.{name}"
    if layer == _FIRST_BLOCK + config.layers:
        return f"{_PREFIX}final_layernorm.{name}"
    raise CheckpointError(f"layer {layer} of a CogLM with {config.layers} blocks has no weights of its own")


def plain_name(pipe_name: str, config: CogLMConfig) -> str:
    """Return the plain name of a PipelineModule's parameter (`3.mlp...`, `tied_modules....weight`)."""
    inner = pipe_name.removeprefix(f"tied_modules.{TIED_KEY}.")
    if inner != pipe_name:
        return _to_plain(0, inner, config)
    layer, _, inner = pipe_name.partition(".")
    if not layer.isdecimal():
        raise CheckpointError(
            f"{pipe_name!r} is not a weight of the pipelined CogLM; expected <layer index>.<name>"
        )
    return _to_plain(int(layer), inner, config)


def load_plain_state(module: PipelineModule, state: dict[str, torch.Tensor], config: CogLMConfig) -> None:
    """Copy a whole CogLM state dict into this rank's layers.

    Raises:
        CheckpointError: a local weight is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            plain = plain_name(name, config)
            if plain not in state or state[plain].shape != parameter.shape:
                found = tuple(state[plain].shape) if plain in state else "nothing"
                raise CheckpointError(
                    f"{plain} needs shape {tuple(parameter.shape)}, found {found}; check the model sizes"
                )
            parameter.copy_(state[plain])
