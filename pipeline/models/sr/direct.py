"""Direct super-resolution: all high-resolution codes in one pass, on top of CogLM (spec 4)."""

import torch
from torch import nn

from cogview2.ops.local_attention import local_attention_2d
from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig
from cogview2.pipeline.models.sr.layout import new_position_rows
from cogview2.pipeline.models.sr.positions import ExtraPositions
from cogview2.pipeline.models.sr.windows import grid_of_heads, merge_grid
from cogview2.pipeline.models.transformer.attention import (
    SelfAttention,
    attend,
    merge_heads,
    score_bias,
    split_heads,
)
from cogview2.pipeline.models.transformer.embeddings import tied_logits
from cogview2.pipeline.models.transformer.init import Linear, output_std
from cogview2.pipeline.models.transformer.trunk import Transformer


class AttentionPlus(nn.Module):
    """The second attention set, one pair of projections for each layer."""

    def __init__(self, base: CogLMConfig) -> None:
        super().__init__()
        std, out_std = base.init_std, output_std(base.init_std, base.layers)
        self.query_key_value = nn.ModuleList(
            Linear(base.hidden, 3 * base.hidden, std) for _ in range(base.layers)
        )
        self.dense = nn.ModuleList(Linear(base.hidden, base.hidden, out_std) for _ in range(base.layers))


class DirectMixins(nn.Module):
    """The weights that CogLM does not have, under their published names."""

    def __init__(self, base: CogLMConfig, cells: int) -> None:
        super().__init__()
        self.extra_position_embedding = ExtraPositions(base, cells)
        self.attention_plus = AttentionPlus(base)


class DirectSR(nn.Module):
    """CogLM with a second attention set and position table for the high-resolution cells."""

    def __init__(
        self, base: CogLMConfig, config: DirectSRConfig, base_grid: int, ratio: int, rows: int
    ) -> None:
        """Build it with fresh weights; see `init_from_coglm`.

        Args:
            base: sizes of CogLM.
            config: sizes of the text area and the windows; `freeze_base` leaves gradients to the new weights.
            base_grid: side of the base grid.
            ratio: high-resolution side / base side.
            rows: rows of the word embeddings.
        """
        super().__init__()
        self.base, self.config, self.base_grid, self.ratio = base, config, base_grid, ratio
        self.level0 = config.text_length + base_grid**2
        self.length = self.level0 + (base_grid * ratio) ** 2
        self.transformer = Transformer(base, rows)
        self.mixins = DirectMixins(base, (base_grid * ratio) ** 2)
        self.transformer.requires_grad_(not config.freeze_base)

    def init_from_coglm(self, state: dict[str, torch.Tensor]) -> None:
        """Start from trained CogLM weights; attention_plus is a copy, positions follow `position_init`.

        Args:
            state: a CogLM state dict, every weight present.
        """
        self.load_state_dict(state | self._mixins_from(state))

    def _mixins_from(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = new_position_rows(
            self.base_grid, self.ratio, self.base.image_position, self.config.position_init
        )
        positions = state["transformer.position_embeddings.weight"]
        new = {"mixins.extra_position_embedding.position_embeddings.weight": positions[rows]}
        for layer in range(self.base.layers):
            for part in ("query_key_value", "dense"):
                for kind in ("weight", "bias"):
                    source = f"transformer.layers.{layer}.attention.{part}.{kind}"
                    new[f"mixins.attention_plus.{part}.{layer}.{kind}"] = state[source]
        return new

    def forward(
        self, tokens_BS: torch.Tensor, position_ids_BS: torch.Tensor, level0_mask_B1LL: torch.Tensor
    ) -> torch.Tensor:
        """Return the hidden states after the final layer norm, [B, S, D]; the cells are the last fine^2 rows.

        Args:
            tokens_BS: int64, see layout.direct_inputs.
            position_ids_BS: int64, below max_positions exactly in level 0.
            level0_mask_B1LL: bool, who sees whom among text and base codes.
        """
        if tokens_BS.shape[1] != self.length:
            raise ValueError(
                f"direct SR needs {self.length} tokens, got {tokens_BS.shape[1]}; see direct_inputs"
            )
        positions_BSD = torch.cat(
            [
                self.transformer.position_embeddings(position_ids_BS[:, : self.level0]),
                self.mixins.extra_position_embedding(position_ids_BS[:, self.level0 :]),
            ],
            dim=1,
        )
        hidden_BSD = self.transformer.embed(tokens_BS, positions_BSD)
        bias = score_bias(level0_mask_B1LL, hidden_BSD.dtype)

        def attend_both(layer: int, attention: SelfAttention, x_BSD: torch.Tensor) -> torch.Tensor:
            return self._attend(layer, attention, x_BSD, bias)

        return self.transformer(hidden_BSD, attend_both)

    def _attend(
        self, layer: int, attention: SelfAttention, x_BSD: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Level 0 with CogLM's attention set, level 1 with the second one over [base cells; its own cells].

        There is no dropout after the output projections here, as published (spec 4.3). `attention_pb_relax` is for
        level 0 alone: the operator of level 1 keeps its scores in float32, where nothing overflows.
        """
        plus, dropout = self.mixins.attention_plus, attention.active_dropout
        q0, k0, v0 = attention.project(x_BSD[:, : self.level0])
        q1, k1, v1 = split_heads(plus.query_key_value[layer](x_BSD[:, self.level0 :]), attention.heads)
        fine, base_cells = self.base_grid * self.ratio, slice(self.config.text_length, None)
        cells = local_attention_2d(
            grid_of_heads(q1, fine),
            grid_of_heads(k1, fine),
            grid_of_heads(v1, fine),
            self.config.local_kernel,
            cross_key=grid_of_heads(k0[:, :, base_cells], self.base_grid),
            cross_value=grid_of_heads(v0[:, :, base_cells], self.base_grid),
            cross_kernel_size=self.config.cross_kernel,
            dropout_p=dropout,
        )
        out0 = attention.dense(merge_heads(attend(q0, k0, v0, bias, dropout, attention.pb_relax)))
        return torch.cat([out0, plus.dense[layer](merge_grid(cells))], dim=1)

    def logits(self, hidden_XD: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Return float32 logits [..., rows] over the first `rows` ids (all by default)."""
        return tied_logits(hidden_XD, self.transformer.word_embeddings.weight, rows)
