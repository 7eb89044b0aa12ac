"""The completion sequence that editing hands to CogLM, against that of the published implementation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.sampling.infilling import lay_out_infilling
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

pytestmark = pytest.mark.golden


def test_completion_sequence(fixtures: Path) -> None:
    calls = load_file(fixtures / "golden/sampling_calls.safetensors")
    seq, weights = calls["completion/seq"], calls["completion/W"]
    redrawn = calls["completion/edit_mask"].numpy()
    cells = calls["completion/pos"][0] - 513
    codes = torch.zeros(400, dtype=torch.int64)
    codes[cells[cells >= 0]] = seq[cells >= 0].clamp_min(0)
    text = seq[: int((weights[0] > 0).sum())].tolist()
    vocabulary = Vocabulary.icetk()
    assert text[-1] == vocabulary.start_of_image  # the released script's second one
    ours = lay_out_infilling(
        text[:-1],
        codes.tolist(),
        redrawn,
        config=CogLMConfig(),
        vocabulary=vocabulary,
        text_attention_bias=float(weights.max()),
        second_start_of_image=True,
    )
    assert torch.equal(ours.tokens[0], seq)
    assert int((seq == -1).sum()) == int(redrawn.sum()) == 27
    assert torch.equal(ours.position_ids, calls["completion/pos"])
    assert torch.equal(ours.attention_mask, calls["completion/mask"] > 0)
    assert torch.equal(ours.attention_bias[0, 0].expand_as(weights), weights)
