"""Stage finetune_superres: direct, then iterative super-resolution, started from CogLM; a record each."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.distributed.process import barrier
from cogview2.pipeline.distributed.seeding import seed_everything
from cogview2.pipeline.training.batches import PairBatches, direct_sample, iterative_sample
from cogview2.pipeline.training.engine import PlainEngine, export_weights
from cogview2.pipeline.training.train_modules.sr import DirectSRTrainModule, IterativeSRTrainModule
from cogview2.pipeline.training.trainer import Trainer
from cogview2.pipeline.weights.files import WEIGHTS, load_into, load_weights
from cogview2.stages._checkpoints import checkpointer
from cogview2.stages._loading import build_direct, build_iterative, load_vocabulary, open_models
from cogview2.stages._runner import StageContext, run_stage
from cogview2.stages._work import work_of

logger = logging.getLogger(__name__)


def _direct(context: StageContext) -> DirectSRTrainModule:
    recipe, vocabulary = context.recipe, load_vocabulary(context.run)
    model = build_direct(recipe, vocabulary.rows)
    if recipe.direct_sr.init_from is not None:
        load_into(model, open_models(recipe.direct_sr.init_from).file("direct-sr"))
        return DirectSRTrainModule(model, vocabulary)
    model.init_from_coglm(load_weights(context.run.stage("pretrain_coglm").output / WEIGHTS))
    return DirectSRTrainModule(model, vocabulary)


def _iterative(context: StageContext) -> IterativeSRTrainModule:
    recipe, vocabulary = context.recipe, load_vocabulary(context.run)
    model = build_iterative(recipe, vocabulary.rows)
    if recipe.iterative_sr.init_from is not None:
        load_into(model, open_models(recipe.iterative_sr.init_from).file("iterative-sr"))
    elif recipe.iterative_sr.model.init == "direct":
        model.init_from_direct(load_weights(context.run.stage("finetune_superres/direct").output / WEIGHTS))
    else:
        state = load_weights(context.run.stage("pretrain_coglm").output / WEIGHTS)
        model.init_from_coglm(state, base_grid=recipe.data.base_grid)
    return IterativeSRTrainModule(model, vocabulary)


def _train_part(
    context: StageContext,
    part: str,
    train: TrainConfig,
    build: Callable[[StageContext], DirectSRTrainModule | IterativeSRTrainModule],
    make: Any,
) -> None:
    run, recipe, world = context.run, context.recipe, context.world
    unit = run.stage(f"finetune_superres/{part}").create()
    if unit.done() is not None:
        logger.info("%s is done", unit.name)
        return
    seed_everything(recipe.seed)
    module = build(context)
    seed_everything(recipe.seed, world.rank + 1)
    deepspeed = resolve(train.deepspeed, train, world.size, cpu=world.device.type == "cpu")
    module.model.transformer.activation_checkpointing = "activation_checkpointing" in deepspeed
    engine = PlainEngine(module, deepspeed, train.optimizer, world)
    batches = PairBatches(
        ShardIndex.load(run.stage("shard_dataset").output / "train"),
        make,
        part,
        seed=recipe.seed,
        global_batch=train.global_batch,
        accumulation=engine.accumulation,
        data_rank=engine.data_rank,
        data_size=engine.data_size,
        only_superres=True,
    )
    result = Trainer(
        engine=engine,
        batches=batches,
        train=train,
        stage=unit,
        checkpointer=checkpointer(context, unit, train, deepspeed),
        world=world,
        stop=context.stop,
        work=work_of(context, unit.name),
    ).fit()
    export_weights(engine, unit.output / WEIGHTS, {"kind": f"{part}-sr"})
    engine.close()  # the next model needs its memory
    if world.is_first:
        context.finish(unit, {"loss": result.loss})
    # Iterative super-resolution may start from these weights, and names them in its fingerprint.
    barrier()


def job(context: StageContext) -> None:
    """Train both models, one after the other."""
    recipe = context.recipe
    common: dict[str, Any] = {"coglm": recipe.coglm.model, "vocabulary": load_vocabulary(context.run)}
    direct = partial(direct_sample, config=recipe.direct_sr.model, **common)
    _train_part(context, "direct", recipe.direct_sr.train, _direct, direct)
    iterative = partial(iterative_sample, config=recipe.iterative_sr.model, **common)
    _train_part(context, "iterative", recipe.iterative_sr.train, _iterative, iterative)


if __name__ == "__main__":
    run_stage("finetune_superres", job)
