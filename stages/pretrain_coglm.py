"""Stage pretrain_coglm: the language model over text and image codes, plain or pipeline parallel."""

import logging
from functools import partial
from typing import Any

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.partition import coglm_bounds
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.distributed.seeding import seed_everything
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.batches import MixedBatches, Mixture, PairBatches, coglm_sample
from cogview2.pipeline.training.engine import PlainEngine, TrainingEngine, export_weights
from cogview2.pipeline.training.train_modules.coglm import coglm_engine
from cogview2.pipeline.training.trainer import StepBatches, Trainer
from cogview2.pipeline.weights.files import WEIGHTS
from cogview2.stages._checkpoints import checkpointer
from cogview2.stages._loading import load_text_to_image, load_vocabulary, open_models
from cogview2.stages._pictures import draw_prompts, fixed_prompts
from cogview2.stages._runner import StageContext, run_stage
from cogview2.stages._work import work_of

logger = logging.getLogger(__name__)


def _engine(context: StageContext, vocabulary: Vocabulary, deepspeed: dict[str, Any]) -> TrainingEngine:
    recipe, world = context.recipe, context.world
    train, start = recipe.coglm.train, recipe.coglm.init_from
    seed_everything(recipe.seed, world.rank + 1)
    return coglm_engine(
        recipe.coglm.model,
        vocabulary,
        train,
        deepspeed,
        coglm_bounds(recipe, deepspeed["pipeline"]["partition"], vocabulary.rows),
        world,
        recipe.seed,
        None if start is None else open_models(start).file("coglm"),
    )


def _batches(context: StageContext, vocabulary: Vocabulary, engine: TrainingEngine) -> StepBatches:
    recipe, shards = context.recipe, context.run.stage("shard_dataset").output
    train, objectives = recipe.coglm.train, recipe.coglm.objectives
    make: Any = partial(coglm_sample, objectives=objectives, config=recipe.coglm.model, vocabulary=vocabulary)
    weight, shape = objectives.text_weight, (engine.data_rank, engine.data_size)
    mixture = Mixture.of(train.global_batch, weight, *shape) if weight else None
    text = 0 if mixture is None else mixture.text_batch
    common: dict[str, Any] = {
        "seed": recipe.seed,
        "accumulation": engine.accumulation,
        "data_rank": engine.data_rank,
        "data_size": engine.data_size,
    }
    pairs = PairBatches(
        ShardIndex.load(shards / "train"),
        make,
        "coglm",
        global_batch=train.global_batch - text,
        part=None if mixture is None else mixture.pairs,
        **common,
    )
    if mixture is None:
        return pairs
    normalisation = objectives.loss_normalisation
    return MixedBatches(
        pairs,
        ShardIndex.load(shards / "text"),
        mixture,
        loss_normalisation=normalisation,
        **common,
    )


def job(context: StageContext) -> None:
    """Train, export, record."""
    recipe, stage, world = context.recipe, context.stage, context.world
    train = recipe.coglm.train
    vocabulary = load_vocabulary(context.run)
    deepspeed = resolve(train.deepspeed, train, world.size, cpu=world.device.type == "cpu")
    engine = _engine(context, vocabulary, deepspeed)
    on_sample = None
    if isinstance(engine, PlainEngine) and engine.engine.zero_optimization_stage() < 3:
        model = engine.module.model
        assert isinstance(model, CogLM)
        prompts = fixed_prompts(context.run, recipe)
        cascade = load_text_to_image(context.run, device=world.device, coglm=model, superres=False)
        on_sample = draw_prompts(stage, cascade, prompts, recipe.seed, model, context.stop)
    result = Trainer(
        engine=engine,
        batches=_batches(context, vocabulary, engine),
        train=train,
        stage=stage,
        checkpointer=checkpointer(context, stage, train, deepspeed),
        world=world,
        stop=context.stop,
        on_sample=on_sample,
        work=work_of(context, stage.name),
    ).fit()
    export_weights(engine, stage.output / WEIGHTS, {"kind": "coglm"})
    if on_sample is None:
        engine.close()  # its memory is for the model that draws
    if world.is_first:
        if on_sample is None:
            # Partitioned over ranks while training: the grid is drawn from the exported weights.
            context.stage.write_heartbeat(train.steps, train.steps, message="drawing samples")
            cascade = load_text_to_image(
                context.run, device=world.device, coglm_weights=stage.output / WEIGHTS, superres=False
            )
            prompts = fixed_prompts(context.run, recipe)
            draw_prompts(stage, cascade, prompts, recipe.seed, None, context.stop)(result.step, None)
        context.finish(stage, {"loss": result.loss})


if __name__ == "__main__":
    run_stage("pretrain_coglm", job)
