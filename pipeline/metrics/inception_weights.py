"""Inception weights from a file that someone else made: three formats, and no Python in them is executed."""

import logging
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.metrics.inception import CLASSES, FEATURES, SIDE, InceptionNetwork

logger = logging.getLogger(__name__)

PUBLISHED_SHA256 = "6726825d"
"""First digits of the sha256 of pt_inception-2015-12-05-6726825d.pth, which carries them in its name."""
_SOURCE = "source_sha256"
_KIND = "inception-2015-12-05"
_REMEDY = (
    "use pt_inception-2015-12-05-6726825d.pth, StyleGAN's inception-2015-12-05.pt, or our .safetensors of one"
)


@dataclass(frozen=True)
class LoadedInception:
    """A network of pixels to (features, logits), where it came from, and whether it is the published one."""

    network: nn.Module
    kind: str
    sha256: str
    published: bool


class TorchScriptInception(nn.Module):
    """StyleGAN's TorchScript export behind the interface of `InceptionNetwork`.

    Only its `layers` (up to pool3) and the weight of its `output` are used: its own forward resizes too.
    """

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.layers = script.layers
        self.output_weight = nn.Parameter(script.output.weight.detach().float(), requires_grad=False)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 2048] and logits [B, 1008] without bias; see `InceptionNetwork`."""
        features_BD = self.layers((pixels_BCHW - 128) / 128).flatten(1)
        return features_BD, F.linear(features_BD, self.output_weight)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return any(name.endswith("/constants.pkl") for name in names)


def _load_torchscript(path: Path) -> TorchScriptInception:
    try:
        with warnings.catch_warnings():
            # torch announces the end of TorchScript at each load; the file format is not ours to choose.
            warnings.simplefilter("ignore")
            script = torch.jit.load(str(path), map_location="cpu").eval()
        network = TorchScriptInception(script)
        with torch.no_grad():
            features_BD, logits_BK = network(torch.zeros(1, 3, SIDE, SIDE))
    except Exception as error:  # noqa: BLE001 - a foreign program: anything may be missing or go wrong in it
        raise CheckpointError(
            f"{path} is not StyleGAN's Inception as TorchScript ({_first_line(error)}); {_REMEDY}"
        ) from error
    if features_BD.shape != (1, FEATURES) or logits_BK.shape != (1, CLASSES):
        raise CheckpointError(
            f"{path} yields {features_BD.shape[-1]} features and {logits_BK.shape[-1]} classes, not "
            f"{FEATURES} and {CLASSES}; {_REMEDY}"
        )
    return network.eval()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _read_tensors(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the state dict in the file, and the hash of its source if the file names one."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                source = (file.metadata() or {}).get(_SOURCE)
                return {name: file.get_tensor(name) for name in file.keys()}, source  # noqa: SIM118 - no mapping
        except Exception as error:  # noqa: BLE001 - SafetensorError is no subclass of anything narrower
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({_first_line(error)}); {_REMEDY}"
            ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a broken or hostile pickle fails in many ways
        # torch's own text advises to load without protection; that advice must not reach anyone.
        raise CheckpointError(
            f"{path} is damaged or holds more than plain tensors ({type(error).__name__}), and nothing in it "
            f"was executed; {_REMEDY}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict; {_REMEDY}")
    return loaded, None


def _check_state(path: Path, state: dict[str, Any], expected: dict[str, Tensor]) -> None:
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(map(str, state.keys() - expected.keys()))
    if missing or extra:
        raise CheckpointError(
            f"{path} is not the Inception network of 2015-12-05: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3]) or 'none'}) and {len(extra)} are unknown "
            f"({', '.join(extra[:3]) or 'none'}); {_REMEDY}"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape != expected[name].shape:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name} is {shape}, not {tuple(expected[name].shape)}; {_REMEDY}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; fetch the file again")


def load_inception(path: Path) -> LoadedInception:
    """Load Inception weights on the CPU.

    Args:
        path: the published PyTorch state dict, StyleGAN's TorchScript file, or a file of `save_inception`.

    Raises:
        CheckpointError: missing, damaged, hostile, or another network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; {_REMEDY}")
    sha256 = fsops.sha256_file(path)
    logger.info("feature network %s, sha256 %s", path, sha256)
    if _is_torchscript(path):
        return LoadedInception(_load_torchscript(path), f"{_KIND} (TorchScript)", sha256, published=False)
    state, source = _read_tensors(path)
    state = {name: tensor for name, tensor in state.items() if not str(name).endswith("num_batches_tracked")}
    with torch.device("meta"):
        network = InceptionNetwork()
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    expected = {name: tensor for name, tensor in network.state_dict().items() if name not in counters}
    _check_state(path, state, expected)
    network.load_state_dict(
        {name: tensor.float() for name, tensor in state.items()}
        | {name: torch.zeros((), dtype=torch.long) for name in counters},
        assign=True,
    )
    network.requires_grad_(False)
    return LoadedInception(
        network.eval(), _KIND, sha256, published=(source or sha256).startswith(PUBLISHED_SHA256)
    )


def save_inception(network: InceptionNetwork, path: Path, source_sha256: str) -> None:
    """Write the weights as safetensors, with the hash of the file that they came from."""
    tensors = {
        name: tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    fsops.write_bytes(Path(path), safetensors.torch.save(tensors, metadata={_SOURCE: source_sha256}))
