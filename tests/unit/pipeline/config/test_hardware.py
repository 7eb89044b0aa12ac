"""The hardware table: found by name or by what a device calls itself."""

import pytest

from cogview2.pipeline.config.hardware import find_hardware, hardware_table, peak_flops
from cogview2.pipeline.errors import ConfigError


def test_every_entry_is_complete_and_has_a_name_of_its_own() -> None:
    table = hardware_table()
    assert {"v100_32", "a100_40", "a100_80", "l40s", "h100_80", "h200_141", "b200_180"} <= set(table)
    devices = [entry.device for entry in table.values()]
    assert not [one for one in devices if sum(one in other for other in devices) > 1]
    for entry in table.values():
        assert {"fp16", "fp32"} <= set(entry.tflops)
        assert entry.network_gb_s <= entry.link_gb_s * entry.per_host


@pytest.mark.parametrize(
    ("name", "device", "kind", "expected"),
    [
        (None, "NVIDIA H200", "bf16", 989e12),
        (None, "NVIDIA A100-SXM4-40GB", "bf16", 312e12),
        ("l40s", "NVIDIA H200", "bf16", 362e12),
        (None, "Tesla V100-SXM2-32GB", "tf32", 15.7e12),
        (None, "Tesla V100-SXM2-32GB", "bf16", None),
        ("v100_32", None, "tf32", 15.7e12),
        (None, "abacus", "bf16", None),
        (None, None, "bf16", None),
    ],
)
def test_peaks(name: str | None, device: str | None, kind: str, expected: float | None) -> None:
    assert peak_flops(name, device, kind) == expected


def test_unknown_names_and_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="hardware abacus is not in the table; use one of v100_32"):
        find_hardware("abacus")
    with pytest.raises(ConfigError, match="has no bf16 matrix products; use one of fp16, fp32"):
        find_hardware("v100_32").peak("bf16")
