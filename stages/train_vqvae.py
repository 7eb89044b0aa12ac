"""Stage train_vqvae: the image tokenizer network."""

import logging
from pathlib import Path

import torch

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.data.pixels import downsample, load_pixels
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.data.sources import Source, open_source
from cogview2.pipeline.distributed.process import barrier, gather_objects
from cogview2.pipeline.distributed.seeding import seed_everything
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.models.vqvae.losses import ms_ssim_scales
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.training.batches import ImageBatches
from cogview2.pipeline.training.engine import PlainEngine, export_weights
from cogview2.pipeline.training.metrics import MetricsWriter
from cogview2.pipeline.training.train_modules.vqvae import VQVAETrainModule
from cogview2.pipeline.training.trainer import SampleCallback, Trainer
from cogview2.pipeline.weights.files import WEIGHTS, save_weights
from cogview2.stages._checkpoints import checkpointer
from cogview2.stages._loading import CLUSTERS, open_models, save_labels
from cogview2.stages._pictures import grid, save_png, to_uint8
from cogview2.stages._runner import StageContext, run_stage
from cogview2.stages._stopping import heeding, look, meet
from cogview2.stages._work import work_of

logger = logging.getLogger(__name__)
SHOWN = 8


def _usable(context: StageContext, source: Source, indices: list[int]) -> list[int]:
    """Return which pictures decode; each rank tries its share, refusals are logged and counted by shard_dataset."""
    if context.recipe.data.source == "drawings":
        return indices
    good: list[int] = []
    with heeding(context.stop):
        for index in indices[context.world.rank :: context.world.size]:
            look(context.stop)
            try:
                load_pixels(source, index, context.recipe.data)
                good.append(index)
            except RefusedError as error:
                logger.warning("picture %s is left out: %s", source.keys[index], error)
    meet(context.stop, "while trying the pictures; the same command starts again")
    return sorted(index for part in gather_objects(good) for index in part)


def _reconstructions(
    context: StageContext, module: VQVAETrainModule, originals_BCHW: torch.Tensor
) -> SampleCallback:
    """Return a callback that draws originals over their reconstructions at the three rates."""

    def draw(step: int, writer: MetricsWriter | None) -> None:
        if writer is None:
            return
        module.model.eval()
        with torch.no_grad():
            rows = [originals_BCHW]
            for rate in RATES:
                tokenizer = ImageTokenizer(module.model, rate)
                rows.append(tokenizer.decode(tokenizer.encode(originals_BCHW.to(context.world.device))).cpu())
        module.model.train()
        picture = grid([to_uint8(row) for row in rows])
        save_png(context.stage.samples / f"reconstructions_step_{step:09d}.png", picture)
        writer.image(step, "reconstructions (original, rates 4, 8, 16)", picture)

    return draw


def _weights_of(context: StageContext, key: str, source: str) -> VQVAE:
    """Return the VQVAE of a run or weights folder; its sizes must be the recipe's."""
    vqvae = open_models(Path(source)).vqvae()
    wanted = context.recipe.vqvae.model.model_dump()
    for name, value in vqvae.config.model_dump().items():
        if value != wanted[name]:
            raise ConfigError(
                f"vqvae.{key} {source} has {name} {value}, but vqvae.model.{name} is {wanted[name]}; set it to that"
            )
    return vqvae


def _take(context: StageContext, source: str) -> None:
    """Take the VQVAE of a run or weights folder as it is, and its clusters where it has some."""
    if context.world.is_first:
        vqvae, output = _weights_of(context, "take_from", source), Path(context.stage.output)
        labels = open_models(Path(source)).labels()
        if labels is not None:
            save_labels(output / CLUSTERS, labels)
        save_weights(output / WEIGHTS, vqvae.state_dict(), {"kind": "vqvae"})
        logger.info("VQVAE: taken from %s", source)
        context.finish(context.stage, {"taken_from": source})
    barrier()


def job(context: StageContext) -> None:
    """Train, export, record."""
    recipe, stage, world = context.recipe, context.stage, context.world
    config = recipe.vqvae
    if config.take_from is not None:
        _take(context, config.take_from)
        return
    source = open_source(recipe.data, recipe.seed)
    usable = _usable(context, source, source.splits["train"])
    # Equal weights and codebook on every rank: DeepSpeed broadcasts parameters, not buffers.
    seed_everything(recipe.seed)
    module = VQVAETrainModule(config, recipe.seed, recipe.data.compression_rate)
    if config.init_from is not None:
        module.start_from(_weights_of(context, "init_from", config.init_from))
    seed_everything(recipe.seed, world.rank + 1)
    deepspeed = resolve(config.train.deepspeed, config.train, world.size, cpu=world.device.type == "cpu")
    engine = PlainEngine(module, deepspeed, config.train.optimizer, world)
    batches = ImageBatches(
        source,
        usable,
        recipe.data,
        config.image_sizes,
        seed=recipe.seed,
        global_batch=config.train.global_batch,
        accumulation=engine.accumulation,
        data_rank=world.rank,
        data_size=world.size,
    )
    shown: list[torch.Tensor] = []
    for index in [*source.splits["held_out"], *usable]:
        if len(shown) == SHOWN:
            break
        try:
            shown.append(torch.from_numpy(load_pixels(source, index, recipe.data)).float() / 255)
        except RefusedError:
            continue  # counted where held-out pictures are sharded
    originals = downsample(torch.stack(shown), recipe.data.base_size)
    result = Trainer(
        engine=engine,
        batches=batches,
        train=config.train,
        stage=stage,
        checkpointer=checkpointer(context, stage, config.train, deepspeed),
        world=world,
        stop=context.stop,
        on_sample=_reconstructions(context, module, originals),
        work=work_of(context, context.stage.name),
    ).fit()
    export_weights(engine, Path(stage.output) / WEIGHTS, {"kind": "vqvae"})
    if world.is_first:
        scales = {
            kind: ms_ssim_scales(recipe.data.superres_size if kind == "superres" else recipe.data.base_size)
            for kind in config.image_sizes
        }
        context.finish(
            stage,
            {
                "loss": result.loss,
                "perceptual": module.perceptual.name,
                "ms_ssim_scales": scales,
                "pictures": len(usable),
            },
        )


if __name__ == "__main__":
    run_stage("train_vqvae", job)
