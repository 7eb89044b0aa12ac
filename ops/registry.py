"""Makes our op builders known to DeepSpeed, which has no hook for builders of other packages.

All that is touched is internal to DeepSpeed 0.19; tests/unit/ops/test_registry.py holds every table to its promise.
"""

from typing import Any

BUILDER = "LocalAttentionBuilder"


def register() -> None:
    """Add our builders to the tables of DeepSpeed's present accelerator and to its op report; repeat at will.

    Imports deepspeed, builds nothing and does not initialise CUDA.
    """
    import deepspeed.git_version_info
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import op_builder
    from deepspeed.ops.op_builder import all_ops

    from cogview2.ops.local_attention import build
    from cogview2.ops.local_attention.builder import builder_for

    accelerator = get_accelerator()
    builder = builder_for(accelerator)
    _teach(accelerator, builder)
    setattr(op_builder, BUILDER, builder)
    all_ops.ALL_OPS[builder.NAME] = builder()
    deepspeed.git_version_info.installed_ops[builder.NAME] = build.is_installed(builder.LIBRARY)
    # DeepSpeed makes this table from ALL_OPS when it is first asked for; asking now would start compilers.
    compatible = vars(deepspeed.ops).get("__compatible_ops__")
    if compatible is not None:
        compatible[builder.NAME] = builder().is_compatible()


def _teach(accelerator: Any, builder: type) -> None:
    """Let `get_op_builder` and `create_op_builder` of this accelerator find `builder`."""
    if accelerator.get_op_builder(BUILDER) is builder:
        return
    if hasattr(accelerator, "_lazy_init_class_dict"):  # CUDA and others; get_op_builder above has filled it
        accelerator.class_dict[BUILDER] = builder
        return
    theirs = accelerator.get_op_builder  # the CPU: a chain of ifs, and a dummy for every unknown name

    def get_op_builder(class_name: str) -> Any:
        return builder if class_name == BUILDER else theirs(class_name)

    accelerator.get_op_builder = get_op_builder
