"""CPU features and GPU architectures: for which machines a library is made, and on which it runs."""

import os
from pathlib import Path

import pytest

from cogview2.ops.local_attention import build, toolchain


def test_cpu_features_are_instruction_sets_only(tmp_path: Path) -> None:
    machine = os.uname().machine
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text(
        "model name : X\nflags\t\t: fpu vme sse4_2 avx2 fma hypervisor md_clear\n\nflags : avx512f\n"
    )
    arm.write_text("Features\t: fp asimd sve\n")
    assert toolchain.cpu_features(x86) == sorted([machine, "avx2", "fma", "sse4_2"])
    assert toolchain.cpu_features(arm) == sorted([machine, "fp", "asimd", "sve"])
    assert toolchain.cpu_features(tmp_path / "none") == [machine]


def test_code_for_a_device() -> None:
    assert toolchain.serves(["8.0"], (8, 0)) and toolchain.serves(["8.0"], (8, 9))
    assert toolchain.serves(["7.5", "9.0"], (9, 0))
    assert toolchain.serves(["8.0+PTX"], (12, 0))
    assert not toolchain.serves(["8.6"], (8, 0))
    assert not toolchain.serves(["8.0"], (9, 0))
    assert not toolchain.serves(["9.0"], (10, 0))
    names = toolchain.flags("cuda", ["8.0", "9.0+PTX"])
    assert [flag.removeprefix("-gencode=") for flag in names if "gencode" in flag] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("listed", "present", "expected"),
    [
        ("", [(9, 0)], ["9.0"]),
        ("7.5 8.0;9.0", [], ["8.0", "9.0"]),
        ("8.0", [(8, 6)], ["8.0"]),
        ("8.0", [(9, 0)], "which leaves out this machine's 9.0; add it or unset the variable"),
        ("", [(7, 0)], "need compute capability 8.0 or newer, there is 7.0"),
        ("", [], "need compute capability 8.0 or newer, there is no device"),
        ("Hopper", [], "holds 'Hopper', which is no compute capability"),
    ],
)
def test_cuda_architectures(
    listed: str, present: list[tuple[int, int]], expected: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(toolchain, "capabilities", lambda: present)
    if isinstance(expected, list):
        assert toolchain.cuda_architectures() == expected
    else:
        with pytest.raises(build.BuildError, match=expected):
            toolchain.cuda_architectures()
