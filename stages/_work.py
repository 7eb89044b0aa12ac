"""What a sample of a training stage costs, for the meters: the recipe's formulas, and the device on paper."""

import torch

from cogview2.pipeline.config import cost
from cogview2.pipeline.config.deepspeed import read_json
from cogview2.pipeline.config.hardware import peak_flops
from cogview2.pipeline.config.remaining import later_train_flops
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.training.meters import Work
from cogview2.stages._runner import StageContext


def work_of(context: StageContext, unit: str) -> Work:
    """Return the operations, tokens and pictures of one sample of a training unit, and the peak of this rank's device.

    A CPU has no figure in the table, whatever the recipe calls the hardware: it reaches no share of anything.

    """
    recipe, device = context.recipe, context.world.device
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_flops(recipe.launch.hardware, name, product_kind(recipe, unit))
    return Work(
        flops_per_sample=cost.train_flops_per_sample(recipe, unit),
        tokens_per_sample=cost.tokens_per_sample(recipe, unit) or None,
        images_per_sample=cost.images_per_sample(recipe, unit),
        peak_flops_per_rank=peak,
        later_flops=later_train_flops(recipe, unit),
    )


def product_kind(recipe: Recipe, unit: str) -> str:
    """Return the kind of a unit's matrix products, as the hardware table calls it."""
    how = read_json(cost.train_section(recipe, unit).deepspeed)
    if how.fp16 is not None and how.fp16.enabled:
        return "fp16"
    if any(part is not None and part.enabled for part in (how.bf16, how.torch_autocast)):
        return "bf16"
    # PyTorch lets float32 convolutions, but not float32 matrix products, round their factors.
    return "tf32" if unit == cost.VQVAE else "fp32"
