"""Our builder in DeepSpeed's tables, on its CPU accelerator and on its CUDA accelerator without a device."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

deepspeed = pytest.importorskip("deepspeed")

from cogview2.ops import registry  # noqa: E402
from cogview2.ops.local_attention import build, builder, toolchain  # noqa: E402


@pytest.fixture(params=["cpu", "cuda"])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh accelerator that DeepSpeed takes for the machine's; its tables are put back afterwards."""
    import deepspeed.ops
    from deepspeed import git_version_info
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.ops import op_builder
    from deepspeed.ops.op_builder import OpBuilder, all_ops

    chosen = CPU_Accelerator() if request.param == "cpu" else CUDA_Accelerator()
    monkeypatch.setattr(real_accelerator, "ds_accelerator", chosen)
    for table in (all_ops.ALL_OPS, git_version_info.installed_ops, OpBuilder._loaded_ops):
        monkeypatch.setitem(table, "local_attention", None)
        monkeypatch.delitem(table, "local_attention")
    monkeypatch.setattr(op_builder, registry.BUILDER, None, raising=False)
    monkeypatch.delattr(op_builder, registry.BUILDER)
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"cpu_adam": True})
    monkeypatch.setattr(build, "is_installed", lambda name: False)
    return chosen


def test_every_table_has_our_builder(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops import op_builder
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    monkeypatch.setattr(build, "missing", lambda name: None)
    adam = accelerator.get_op_builder("CPUAdamBuilder")
    unknown = accelerator.get_op_builder("NoSuchBuilder")
    for _ in range(2):
        registry.register()
    ours = accelerator.get_op_builder("LocalAttentionBuilder")
    assert issubclass(ours, OpBuilder)
    assert issubclass(ours, CUDAOpBuilder if accelerator.device_name() == "cuda" else CPUOpBuilder)
    assert isinstance(accelerator.create_op_builder("LocalAttentionBuilder"), ours)
    assert op_builder.LocalAttentionBuilder is ours and builder.LocalAttentionBuilder is ours
    assert isinstance(ALL_OPS["local_attention"], ours)
    assert deepspeed.ops.__compatible_ops__["local_attention"] is True
    assert installed_ops["local_attention"] is False
    assert accelerator.get_op_builder("CPUAdamBuilder") is adam
    assert isinstance(accelerator.create_op_builder("CPUAdamBuilder"), adam)
    assert accelerator.get_op_builder("NoSuchBuilder") is unknown


def test_a_table_that_nobody_has_asked_for_is_not_made(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed.ops

    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__")
    registry.register()
    assert "__compatible_ops__" not in vars(deepspeed.ops)


@pytest.mark.parametrize("lack", [None, "no C++ compiler was found (g++); install g++, or set CXX to one"])
def test_the_report_shows_our_op(
    accelerator: Any, lack: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.env_report import op_report

    monkeypatch.setattr(build, "missing", lambda name: lack)
    registry.register()
    capsys.readouterr()
    op_report()
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if line.startswith("local_attention ")]
    assert row.count("[NO]") == (1 if lack is None else 2)
    assert ("[OKAY]" in row) == (lack is None)
    assert lack is None or f"local_attention: {lack}" in text


def test_the_builder_tells_the_truth(accelerator: Any) -> None:
    registry.register()
    ours = accelerator.create_op_builder("LocalAttentionBuilder")
    name = accelerator.device_name()
    assert (ours.NAME, ours.name, ours.BUILD_VAR) == (
        "local_attention",
        "local_attention",
        "DS_BUILD_LOCAL_ATTENTION",
    )
    assert ours.absolute_name() == f"cogview2.ops.local_attention.local_attention_{name}"
    assert ours.sources() == [str(path) for path in toolchain.units(name)]
    assert all(os.path.isabs(path) for path in [*ours.sources(), *ours.include_paths()])
    assert set(ours.cxx_args()) == set(toolchain.flags("cpu"))
    assert set(toolchain.flags("cuda")) <= set(ours.nvcc_args()) if name == "cuda" else not ours.nvcc_args()


def test_load_gives_the_library_that_the_operator_calls(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import OpBuilder

    monkeypatch.setattr(builder, "library", lambda name: f"library {name}")
    registry.register()
    name = accelerator.device_name()
    assert accelerator.create_op_builder("LocalAttentionBuilder").load() == f"library {name}"
    assert OpBuilder._loaded_ops["local_attention"] == f"library {name}"


def test_a_job_registers_when_it_opens_its_process_group() -> None:
    code = (
        "from cogview2.pipeline.distributed.process import process_group, world_from_environment\n"
        "with process_group(world_from_environment()):\n"
        "    from deepspeed.accelerator import get_accelerator\n"
        "    import deepspeed.ops\n"
        "    ours = get_accelerator().create_op_builder('LocalAttentionBuilder')\n"
        "    assert ours.NAME == 'local_attention', ours\n"
        "    assert 'local_attention' in deepspeed.ops.__compatible_ops__\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
