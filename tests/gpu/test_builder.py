"""The CUDA builder on a real device: DeepSpeed's tables, the build, the cache."""

import re
from pathlib import Path

import pytest
import torch

from cogview2.ops.local_attention import build, toolchain

pytestmark = pytest.mark.gpu


def test_the_cuda_kernels_build_for_this_device() -> None:
    assert build.missing("cuda") is None
    assert build.load("cuda") is build.load("cuda")
    assert re.match("built: |installed ahead of time: ", build.state("cuda"))
    if not build.is_installed("cuda"):
        library = Path(build.state("cuda").removeprefix("built: "))
        major, minor = torch.cuda.get_device_capability()
        assert toolchain.serves(toolchain.cuda_architectures(), (major, minor))
        assert toolchain.plan("cuda").file_name == library.name


def test_deepspeed_knows_the_cuda_builder(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    from cogview2.ops.registry import register

    register()
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.env_report import op_report
    from deepspeed.ops.op_builder import CUDAOpBuilder
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    if get_accelerator().device_name() != "cuda":
        pytest.skip("DeepSpeed has chosen another accelerator")
    ours = get_accelerator().create_op_builder("LocalAttentionBuilder")
    assert isinstance(ours, CUDAOpBuilder)
    assert type(ALL_OPS["local_attention"]) is type(ours)
    assert ours.is_compatible(verbose=True)
    assert deepspeed.ops.__compatible_ops__["local_attention"] is True
    library = ours.load()
    assert hasattr(library, "forward") and hasattr(library, "backward")
    op_report()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("local_attention ")]
    assert "[OKAY]" in row
