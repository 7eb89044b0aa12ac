"""Small weights in the published forms, made by obvious code that shares nothing with the product's converter."""

import enum
import functools
import json
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from cogview2.pipeline.config.model import VQVAEConfig
from cogview2.pipeline.models.vqvae.model import VQVAE

HIDDEN, HEADS, LAYERS, ROWS, POSITIONS = 16, 4, 2, 30, 64


def transformer_state(
    *, extra: str = "", cells: int = 36, dtype: torch.dtype = torch.float16, rows: int = ROWS, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return random weights under the published names; `extra` is "", "iterative" or "direct"."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator).to(dtype)

    add("transformer.word_embeddings.weight", rows, HIDDEN)
    add("transformer.position_embeddings.weight", POSITIONS, HIDDEN)
    for i in range(LAYERS):
        layer = f"transformer.layers.{i}"
        norms = ("input_layernorm", "post_attention_layernorm", "third_layernorm", "fourth_layernorm")
        for name in norms:
            add(f"{layer}.{name}.weight", HIDDEN)
            add(f"{layer}.{name}.bias", HIDDEN)
        for name, outputs, inputs in (
            ("attention.query_key_value", 3 * HIDDEN, HIDDEN),
            ("attention.dense", HIDDEN, HIDDEN),
            ("mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN),
            ("mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN),
        ):
            add(f"{layer}.{name}.weight", outputs, inputs)
            add(f"{layer}.{name}.bias", outputs)
    add("transformer.final_layernorm.weight", HIDDEN)
    add("transformer.final_layernorm.bias", HIDDEN)
    if extra:
        add("mixins.extra_position_embedding.position_embeddings.weight", cells, HIDDEN)
    if extra == "direct":
        for i in range(LAYERS):
            for name, outputs in (("query_key_value", 3 * HIDDEN), ("dense", HIDDEN)):
                add(f"mixins.attention_plus.{name}.{i}.weight", outputs, HIDDEN)
                add(f"mixins.attention_plus.{name}.{i}.bias", outputs)
    return state


def rank_state(state: dict[str, torch.Tensor], rank: int, parts: int) -> dict[str, torch.Tensor]:
    """Cut a state dict as rank `rank` of `parts` holds it (spec 10.3), row by row and head by head."""
    found = {}
    for name, tensor in state.items():
        if "query_key_value" in name:
            third = len(tensor) // 3
            share = third // parts
            rows = [third * part + rank * share + row for part in range(3) for row in range(share)]
            found[name] = tensor[rows].clone()
        elif "dense_h_to_4h" in name or "word_embeddings" in name:
            share = len(tensor) // parts
            found[name] = tensor[[rank * share + row for row in range(share)]].clone()
        elif tensor.ndim == 2 and ("dense." in name or "dense_4h_to_h" in name):
            share = tensor.shape[1] // parts
            found[name] = tensor[:, [rank * share + column for column in range(share)]].clone()
        else:
            found[name] = tensor.clone()
    return found


def training_objects(modules: dict[str, types.ModuleType]) -> dict[str, Any]:
    """Return what DeepSpeed and the published trainer store beside the weights.

    Args:
        modules: gets stand-ins for DeepSpeed's modules; pickling needs them in sys.modules, loading must not.
    """
    scaler, config = (
        types.ModuleType(f"deepspeed.runtime.{name}") for name in ("fp16.loss_scaler", "zero.config")
    )

    class LossScaler:
        def __init__(self) -> None:
            self.cur_scale = 1.0

    class ZeroStageEnum(int, enum.Enum):
        weights = 3

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            """As the Python of then wrote it; some later ones write a getattr."""
            return type(self), (self.value,)

    for module, found in ((scaler, LossScaler), (config, ZeroStageEnum)):
        found.__module__, found.__qualname__ = module.__name__, found.__name__
        setattr(module, found.__name__, found)
        modules[module.__name__] = module
    return {
        "iteration": 432000,
        "client_lr_scheduler": {"warmup_iter": 10, "num_iters": 3, "decay_style": "cosine"},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
        "optimizer": None,
        "lr_scheduler": None,
        "csr_tensor_module_names": {"word_embeddings"},
        "skipped_steps": 3,
        "global_steps": 432000,
        "dp_world_size": 256,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": ZeroStageEnum.weights}},
        "ds_version": "0.3.16",
        "loss_scaler": LossScaler(),
        "numpy_number": np.float64(0.5),
    }


def save_archive(path: Path, content: dict[str, Any], *, legacy: bool = False) -> None:
    """Write a torch file as it was written with an old NumPy: `numpy.core`, not `numpy._core`."""
    modules: dict[str, types.ModuleType] = {}
    whole = content | training_objects(modules)
    parents = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.zero")
    with mock.patch.dict(sys.modules, {name: types.ModuleType(name) for name in parents} | modules):
        torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    old, new = b"numpy._core.multiarray", b"numpy.core.multiarray"
    if legacy:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))
        return
    rewrite_member(path, "data.pkl", lambda data: data.replace(old, new))


def rewrite_member(path: Path, ending: str, change: Any) -> None:
    """Change the content of one member of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            if name.endswith(ending):
                changed = change(data)
                assert changed != data
                data = changed
            archive.writestr(name, data)


def sat_config(**changes: Any) -> dict[str, Any]:
    """Return a model_config.json of the tiny transformer."""
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "vocab_size": ROWS,
        "layernorm_order": "sandwich",
        "tokenizer_type": "icetk",
        "model_class": "whatever",
    } | changes


def sat_directory(
    folder: Path,
    state: dict[str, torch.Tensor],
    *,
    parts: int = 1,
    legacy: bool = False,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write the directory of a published training."""
    inner = folder / "432000"
    inner.mkdir(parents=True)
    (folder / "latest").write_text("432000\n")
    (folder / "model_config.json").write_text(json.dumps(sat_config() if config is None else config))
    for rank in range(parts):
        content = {"module": rank_state(state, rank, parts)}
        save_archive(inner / f"mp_rank_{rank:02d}_model_states.pt", content, legacy=legacy)
    return folder


@functools.cache
def vqvae_state() -> dict[str, torch.Tensor]:
    """Return a tiny VQVAE with 12 codes in float16; its names and shapes are tested elsewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = VQVAEConfig(base_channels=8, norm_groups=4, latent_channels=8, codebook_size=12)
        return {name: value.half() for name, value in VQVAE(config).state_dict().items()}


def vqvae_file(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write an ice_image.pt with its sizes beside it."""
    torch.save({"module": state}, path)
    path.with_suffix(".json").write_text(json.dumps({"norm_groups": 4, "codebook_size": 12}))


class Evil:
    """An object that a careless loader would build by calling `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def plain_pickle(path: Path, value: Any) -> None:
    """Write a bare pickle, as malware does."""
    path.write_bytes(pickle.dumps(value, protocol=2))


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a .safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
