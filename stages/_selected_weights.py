"""Which models an evaluation measures: this run's, or those that evaluate.weights names: RUN, RUN@STEP, weights folder."""

from dataclasses import dataclass
from pathlib import Path

from cogview2.pipeline import fsops
from cogview2.pipeline.distributed.process import barrier
from cogview2.pipeline.errors import CheckpointError, ConfigError
from cogview2.pipeline.run_dir import MODEL_FILES, split_step
from cogview2.pipeline.training.extract import trained_weights
from cogview2.pipeline.weights.files import WEIGHTS, save_weights
from cogview2.pipeline.weights_manifest import KINDS, digests
from cogview2.stages._loading import Models, RunModels, open_models
from cogview2.stages._runner import StageContext


@dataclass(frozen=True)
class Selected:
    """What is evaluated."""

    name: str
    models: Models
    coglm: Path | None
    """Weights of CogLM other than the models' own."""
    digests: dict[str, str]
    """File -> sha256 of everything that draws."""


def _digests(models: Models) -> dict[str, str]:
    if not isinstance(models, RunModels):
        return digests(models.path, KINDS)
    found = {}
    for kind in KINDS:
        unit, names = MODEL_FILES[kind]
        record = models.run.stage(unit).done()
        if record is None or f"output/{names[0]}" not in record.outputs:
            raise CheckpointError(f"{models.path} has no finished stage {unit}; run it first")
        found[f"{unit}/{names[0]}"] = record.outputs[f"output/{names[0]}"].sha256
    return found


def select_weights(context: StageContext) -> Selected:
    """Resolve evaluate.weights; collective.

    Raises:
        ConfigError: a step of a weights folder.
        CheckpointError: no such run, stage or checkpoint.
    """
    wanted = context.recipe.evaluate.weights
    path, step = split_step(wanted) if wanted is not None else (context.run, None)
    models = open_models(path)
    found = _digests(models)
    if step is None:
        return Selected(wanted or str(context.run.path.name), models, None, found)
    if not isinstance(models, RunModels):
        raise ConfigError(f"evaluate.weights {wanted}: a weights folder has no steps; leave @{step} out")
    run = models.run
    exported = context.stage.path / "work" / f"coglm-{run.path.name}-{step:09d}.safetensors"
    if context.world.is_first:
        fsops.make_dirs(exported.parent)
        folder = run.stage("pretrain_coglm").checkpoints / f"step_{step:09d}"
        if not folder.is_dir():
            have = ", ".join(sorted(p.name for p in folder.parent.glob("step_*"))) or "none"
            raise CheckpointError(f"{run.path} has no checkpoint of step {step}; it has {have}")
        save_weights(exported, trained_weights(folder), {"kind": "coglm"})
    barrier()
    found[f"pretrain_coglm/{WEIGHTS}"] = fsops.sha256_file(exported)
    return Selected(str(wanted), models, exported, found)
