"""CogLM with random weights and random samples of its shape: what the benchmarks of training train."""

import torch

from cogview2.pipeline.config.cost import coglm_layer_flops
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.masks import CONTEXT, IMAGE
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

Batch = dict[str, torch.Tensor]


def vocabulary(rows: int) -> Vocabulary:
    """A vocabulary of `rows` ids, of which at most 20,000 and about a half are image codes."""
    codes = min(20_000, rows // 2)
    return Vocabulary.uniform(codes, rows - codes - 3)


def samples(config: CogLMConfig, rows: int, count: int, seed: int, device: torch.device) -> Batch:
    """Return `count` text-image samples: all text slots are context, every code of the picture is predicted.

    int64 [B, S] tokens, position_ids, roles and labels; loss_mask bool and loss_weights float32 [B, S].
    S fills the positions up to the end of the picture (400 codes at the published sizes).
    """
    random = torch.Generator().manual_seed(seed)
    text, cells = config.text_length, cells_of(config)
    tokens = torch.randint(0, vocabulary(rows).image_codes, (count, text + cells + 1), generator=random)
    # The last text slot is <start_of_image>.
    places = [torch.arange(text - 1), config.image_position + torch.arange(cells + 1)]
    positions = torch.cat(places).expand(count, -1)
    roles = torch.cat([torch.full((text,), CONTEXT), torch.full((cells,), IMAGE)]).expand(count, -1)
    loss_mask = torch.zeros(count, text + cells, dtype=torch.bool)
    loss_mask[:, text - 1 : -1] = True
    batch = {
        "tokens": tokens[:, :-1],
        "position_ids": positions,
        "roles": roles,
        "labels": tokens[:, 1:],
        "loss_mask": loss_mask,
        "loss_weights": loss_mask.float(),
    }
    return {name: value.contiguous().to(device) for name, value in batch.items()}


def cells_of(config: CogLMConfig) -> int:
    """Return the codes of a picture: what is left of the positions, at most 400 as published."""
    return min(400, config.max_positions - config.image_position - 1)


def sequence_of(config: CogLMConfig) -> int:
    """Return the tokens of a sample."""
    return config.text_length + cells_of(config)


def train_flops(config: CogLMConfig, rows: int) -> float:
    """Return the model FLOPs of forward and backward pass of one sample of `samples`."""
    return 3 * sum(coglm_layer_flops(config, rows, sequence_of(config), cells_of(config)))
