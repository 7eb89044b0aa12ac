"""The hardware table: devices by the figures of their data sheets (hardware.yaml)."""

import importlib.resources
from functools import cache
from typing import Annotated

import yaml
from pydantic import Field

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]


class Hardware(Config):
    """One kind of device in its usual host; units as in hardware.yaml."""

    device: str

    memory_gb: Positive
    memory_gb_s: Positive
    tflops: dict[str, Positive]
    per_host: Annotated[int, Field(ge=1)]
    link_gb_s: Positive
    network_gb_s: Positive

    def peak(self, kind: str) -> float:
        """Return the FLOP/s of dense products of `kind`: bf16, fp16, tf32 or fp32 (of tf32 where there is none)."""
        found = self.tflops.get(kind) or (self.tflops.get("fp32") if kind == "tf32" else None)
        if found is None:
            raise ConfigError(
                f"{self.device} has no {kind} matrix products; use one of {', '.join(self.tflops)} in the DeepSpeed JSON"
            )
        return found * 1e12


@cache
def hardware_table() -> dict[str, Hardware]:
    """Return the table: name -> device."""
    text = (importlib.resources.files("cogview2.pipeline.config") / "hardware.yaml").read_text(
        encoding="utf-8"
    )
    return {name: Hardware.model_validate(values) for name, values in yaml.safe_load(text).items()}


def find_hardware(name: str) -> Hardware:
    """Return a device of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    table = hardware_table()
    if name not in table:
        raise ConfigError(f"hardware {name} is not in the table; use one of {', '.join(table)}")
    return table[name]


def peak_flops(name: str | None, device: str | None, kind: str) -> float | None:
    """Return the FLOP/s of one device on paper, or None where it is not in the table or has no products of this kind.

    Args:
        name: `launch.hardware` of the recipe; wins.
        device: the name that the device gives itself (torch.cuda.get_device_name), or None on a CPU.
        kind: bf16, fp16, tf32 or fp32.

    Raises:
        ConfigError: `name` is not in the table.
    """
    if name is not None:
        found = [find_hardware(name)]
    else:
        found = [
            entry for entry in hardware_table().values() if device is not None and entry.device in device
        ]
    kinds = (kind, "fp32") if kind == "tf32" else (kind,)
    return found[0].peak(kind) if found and any(each in found[0].tflops for each in kinds) else None
