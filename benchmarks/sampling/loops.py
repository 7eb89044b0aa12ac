"""The same sampling in plain PyTorch functions: what a short script would do, and what the authors' loop does.

Dims: B batch, S new tokens, T tokens so far, N heads, K head dim, D hidden, V image codes, C clusters.
Prompts fill all text slots, so nobody needs a mask after the prompt; the prompt is a plain prefix.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig

Tensor = torch.Tensor
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values of the new tokens [B, N, S, K]) -> [B, N, S, K]."""


def draw_straight(
    logits_BV: Tensor, labels_V: Tensor, clusters: int, config: AutoregressiveSamplingConfig
) -> Tensor:
    """Cluster sampling as its definition reads (spec 3.3), with the random numbers of torch."""
    scaled_BV = logits_BV / config.temperature
    chances_BV = torch.softmax(scaled_BV, dim=-1)
    masses_BC = torch.zeros(len(logits_BV), clusters)
    masses_BC.scatter_add_(1, labels_V.expand_as(chances_BV), chances_BV)
    best = masses_BC.topk(config.top_k_clusters, dim=1)
    choice_B1 = best.indices.gather(1, torch.multinomial(best.values, 1))
    scaled_BV[labels_V[None, :] != choice_B1] = -65504.0
    return torch.multinomial(torch.softmax(scaled_BV / config.cluster_temperature, dim=-1), 1)


class Plain:
    """A sandwich-LN transformer as functions over a state dict of CogLM."""

    def __init__(self, state: dict[str, Tensor], config: CogLMConfig, codes: int) -> None:
        self.config = config
        self.words = state["transformer.word_embeddings.weight"]
        self.positions = state["transformer.position_embeddings.weight"]
        self.head = self.words[:codes].float()
        self.final = [state[f"transformer.final_layernorm.{kind}"] for kind in ("weight", "bias")]
        names = ("input_layernorm", "attention.query_key_value", "attention.dense", "third_layernorm")
        names += ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "fourth_layernorm")
        self.layers = [
            [
                (
                    state[f"transformer.layers.{layer}.{name}.weight"],
                    state[f"transformer.layers.{layer}.{name}.bias"],
                )
                for name in names
            ]
            for layer in range(config.layers)
        ]

    def __call__(self, tokens_BS: Tensor, positions_S: Tensor, attend: Attend) -> Tensor:
        """Return the logits of the last token, [B, V]."""
        hidden, eps = self.config.hidden, self.config.layernorm_eps

        def norm(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
            return F.layer_norm(x, (hidden,), *weights, eps)

        x = F.embedding(tokens_BS, self.words) + F.embedding(positions_S, self.positions)
        batch, length, _ = x.shape
        for number, (ln1, qkv, dense, ln3, ln2, up, down, ln4) in enumerate(self.layers):
            packed = F.linear(norm(x, ln1), *qkv).view(batch, length, 3, self.config.heads, -1)
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            out = attend(number, q, k, v).transpose(1, 2).reshape(batch, length, hidden)
            x = x + norm(F.linear(out, *dense), ln3)
            inner = F.gelu(F.linear(norm(x, ln2), *up), approximate="tanh")
            x = x + norm(F.linear(inner, *down), ln4)
        return F.linear(F.layer_norm(x[:, -1], (hidden,), *self.final, eps).float(), self.head)


def _loop(
    model: Plain,
    prompts_BS: Tensor,
    cells: int,
    labels_V: Tensor,
    sampling: AutoregressiveSamplingConfig,
    attend: Attend,
) -> Tensor:
    slots, clusters = prompts_BS.shape[1], int(labels_V.max()) + 1
    positions = torch.cat([torch.arange(slots - 1), model.config.image_position + torch.arange(cells)])
    tokens, start, drawn = prompts_BS, 0, []
    with torch.no_grad():
        for cell in range(cells):
            stop = slots + cell
            logits = model(tokens, positions[start:stop], attend)
            tokens, start = draw_straight(logits, labels_V, clusters, sampling), stop
            drawn.append(tokens)
    return torch.cat(drawn, dim=1)


def _prompt_bias(length: int, weight: float) -> Tensor:
    """Text sees text, <start_of_image> sees all; W on the text columns. [S, S]"""
    bias = torch.full((length, length), weight)
    bias[:, -1] = -1e4
    bias[-1, -1] = 0
    return bias


def preallocated_loop(
    model: Plain, prompts_BS: Tensor, cells: int, labels_V: Tensor, sampling: AutoregressiveSamplingConfig
) -> Tensor:
    """A bare loop: the cache is allocated once and written in place; int64 [B, cells]."""
    config, (batch, slots) = model.config, prompts_BS.shape
    length, used = slots + cells - 1, [0] * config.layers
    cache = torch.empty(config.layers, 2, batch, config.heads, length, config.hidden // config.heads)
    prompt_bias = _prompt_bias(slots, sampling.text_attention_bias)
    row_bias = torch.zeros(1, length)
    row_bias[:, : slots - 1] = sampling.text_attention_bias

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, stop = used[layer], used[layer] + k.shape[2]
        keys, values = cache[layer]
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        used[layer] = stop
        bias = row_bias[:, :stop] if start else prompt_bias
        return F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop], attn_mask=bias)

    return _loop(model, prompts_BS, cells, labels_V, sampling, attend)


def concatenating_loop(
    model: Plain, prompts_BS: Tensor, cells: int, labels_V: Tensor, sampling: AutoregressiveSamplingConfig
) -> Tensor:
    """The authors' way (spec 3.2): one cache [L, B, T, 2 D] of all layers, made anew at every token."""
    config, (batch, slots) = model.config, prompts_BS.shape
    memory = torch.empty(config.layers, batch, 0, 2 * config.hidden)
    new: list[Tensor] = []
    prompt_bias = _prompt_bias(slots, sampling.text_attention_bias)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal memory
        new.append(torch.cat([part.transpose(1, 2).flatten(2) for part in (k, v)], dim=-1))
        whole = torch.cat([memory[layer], new[-1]], dim=1)
        keys, values = whole.view(batch, whole.shape[1], 2, config.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q / q.shape[-1] ** 0.5 @ keys.transpose(-1, -2)
        if q.shape[2] > 1:
            scores = scores + prompt_bias
        else:
            weights = torch.zeros(1, whole.shape[1])
            weights[:, : slots - 1] = sampling.text_attention_bias
            scores = scores + weights
        if layer == config.layers - 1:
            memory = torch.cat([memory, torch.stack(new)], dim=2)
            new.clear()
        return torch.softmax(scores, dim=-1) @ values

    return _loop(model, prompts_BS, cells, labels_V, sampling, attend)
