"""Iterative super-resolution: masked cells are predicted from their neighbourhood and the text (spec 5)."""

import torch
import torch.nn.functional as F
from torch import nn

from cogview2.ops.local_attention import local_attention_2d
from cogview2.pipeline.config.model import CogLMConfig, IterativeSRConfig
from cogview2.pipeline.models.sr.layout import new_position_rows
from cogview2.pipeline.models.sr.positions import ExtraPositions
from cogview2.pipeline.models.sr.windows import grid_of_heads, merge_grid
from cogview2.pipeline.models.transformer.attention import SelfAttention, attend, merge_heads, score_bias
from cogview2.pipeline.models.transformer.embeddings import tied_logits
from cogview2.pipeline.models.transformer.trunk import Transformer


class IterativeMixins(nn.Module):
    """The weights that CogLM does not have, under their published names."""

    def __init__(self, base: CogLMConfig, cells: int) -> None:
        super().__init__()
        self.extra_position_embedding = ExtraPositions(base, cells)


class IterativeSR(nn.Module):
    """CogLM's transformer on [text | high-resolution cells] with local attention among the cells."""

    def __init__(self, base: CogLMConfig, config: IterativeSRConfig, grid: int, rows: int) -> None:
        """Build it with fresh weights; see `init_from_coglm`.

        Args:
            base: sizes of CogLM.
            config: sizes of the text area and the window.
            grid: side of the high-resolution grid.
            rows: rows of the word embeddings.
        """
        super().__init__()
        self.base, self.config, self.grid = base, config, grid
        self.length = config.text_length + grid**2
        self.transformer = Transformer(base, rows)
        self.mixins = IterativeMixins(base, grid**2)

    def init_from_coglm(self, state: dict[str, torch.Tensor], *, base_grid: int) -> None:
        """Start from trained CogLM weights, the new positions by `position_init`.

        Args:
            state: a CogLM state dict, every weight present.
            base_grid: side of the grid that CogLM's positions are made for; divides `grid`.
        """
        if self.grid % base_grid:
            raise ValueError(f"grid {self.grid} must be a multiple of the base grid, got {base_grid}")
        rows = new_position_rows(
            base_grid, self.grid // base_grid, self.base.image_position, self.config.position_init
        )
        positions = state["transformer.position_embeddings.weight"]
        self.load_state_dict(
            state | {"mixins.extra_position_embedding.position_embeddings.weight": positions[rows]}
        )

    def init_from_direct(self, state: dict[str, torch.Tensor]) -> None:
        """Start from trained direct SR: its cells become these cells, its second attention set the only one.

        Args:
            state: a DirectSR state dict of the same CogLM sizes and grid, every weight present.
        """
        own = {name: weight for name, weight in state.items() if name.startswith("transformer.")}
        for layer in range(self.base.layers):
            for part in ("query_key_value", "dense"):
                for kind in ("weight", "bias"):
                    source = f"mixins.attention_plus.{part}.{layer}.{kind}"
                    own[f"transformer.layers.{layer}.attention.{part}.{kind}"] = state[source]
        positions = "mixins.extra_position_embedding.position_embeddings.weight"
        self.load_state_dict(own | {positions: state[positions]})

    def forward(
        self, tokens_BS: torch.Tensor, position_ids_BS: torch.Tensor, text_mask_BL: torch.Tensor
    ) -> torch.Tensor:
        """Return the hidden states after the final layer norm, [B, S, D]; row i predicts token i (no shift).

        Text sees the real text; cells see the real text and their window, in one softmax.

        Args:
            tokens_BS: int64, see layout.iterative_inputs.
            position_ids_BS: int64, below max_positions exactly in the text area.
            text_mask_BL: bool, True = real text.
        """
        if tokens_BS.shape[1] != self.length:
            raise ValueError(
                f"iterative SR needs {self.length} tokens, got {tokens_BS.shape[1]}; see iterative_inputs"
            )
        text_length = self.config.text_length
        positions_BSD = torch.cat(
            [
                self.transformer.position_embeddings(position_ids_BS[:, :text_length]),
                self.mixins.extra_position_embedding(position_ids_BS[:, text_length:]),
            ],
            dim=1,
        )
        hidden_BSD = self.transformer.embed(tokens_BS, positions_BSD)
        # float32: the kernels add it before rounding, and float16 has no number that hides for certain.
        token_bias = score_bias(text_mask_BL, torch.float32)
        bias = score_bias(text_mask_BL[:, None, None, :], hidden_BSD.dtype)

        def attend_layer(layer: int, attention: SelfAttention, x_BSD: torch.Tensor) -> torch.Tensor:
            return self._attend(attention, x_BSD, bias, token_bias)

        return self.transformer(hidden_BSD, attend_layer)

    def _attend(
        self, attention: SelfAttention, x_BSD: torch.Tensor, bias: torch.Tensor, token_bias: torch.Tensor
    ) -> torch.Tensor:
        """Text attends to the text, cells to the text and their window, with one attention set.

        `attention_pb_relax` is for the text alone: the cells' operator keeps its scores in float32.
        """
        length, dropout = self.config.text_length, attention.active_dropout
        q, k, v = attention.project(x_BSD)
        text_q, text_k, text_v = (part[:, :, :length] for part in (q, k, v))
        cells_q, cells_k, cells_v = (grid_of_heads(part[:, :, length:], self.grid) for part in (q, k, v))
        cells = local_attention_2d(
            cells_q,
            cells_k,
            cells_v,
            self.config.local_kernel,
            additional_keys=text_k.transpose(1, 2),
            additional_values=text_v.transpose(1, 2),
            additional_bias=token_bias,
            dropout_p=dropout,
        )
        text = merge_heads(attend(text_q, text_k, text_v, bias, dropout, attention.pb_relax))
        out = attention.dense(torch.cat([text, merge_grid(cells)], dim=1))
        return F.dropout(out, attention.dropout, attention.training)

    def logits(self, hidden_XD: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Return float32 logits [..., rows] over the first `rows` ids (all by default)."""
        return tied_logits(hidden_XD, self.transformer.word_embeddings.weight, rows)
