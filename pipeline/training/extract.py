"""The weights inside a checkpoint, without an engine."""

from pathlib import Path
from typing import Any

import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.coglm.pipe import pipe_to_plain
from cogview2.pipeline.training.checkpoint import verify

_MODULE_PREFIX = "model."


def coglm_state(folder: Path, config: CogLMConfig) -> dict[str, torch.Tensor]:
    """Return CogLM's weights of a verified checkpoint of stage pretrain_coglm, as trained (fp32 or bf16).

    Raises:
        CheckpointError: the checkpoint is damaged, or its parameters are partitioned (ZeRO-3).
    """
    verify(folder)
    layers = sorted((folder / "ds").glob("layer_*-model_states.pt"))
    if layers:
        states = {int(path.name.split("_")[1].split("-")[0]): _load(path) for path in layers}
        return pipe_to_plain(states, config)
    file = folder / "ds" / "mp_rank_00_model_states.pt"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds partitioned parameters (ZeRO-3); evaluate the exported weights instead"
        )
    module = _load(file)["module"]
    return {
        name.removeprefix(_MODULE_PREFIX): t for name, t in module.items() if name.startswith(_MODULE_PREFIX)
    }


def _load(path: Path) -> dict[str, Any]:
    # Only tensors and plain values: what DeepSpeed adds besides is not needed, so its classes are allowed by name only.
    from deepspeed.runtime.zero.config import ZeroStageEnum

    with torch.serialization.safe_globals([ZeroStageEnum]):
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded
