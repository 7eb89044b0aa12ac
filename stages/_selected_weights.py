"""Which weights an evaluation measures: this run's final ones, or `RUN` or `RUN@step` of evaluate.weights."""

from dataclasses import dataclass
from pathlib import Path

from cogview2.pipeline import fsops, weights
from cogview2.pipeline.distributed.process import barrier
from cogview2.pipeline.errors import CheckpointError, ConfigError
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.training.extract import coglm_state
from cogview2.stages._runner import StageContext

_READ = (
    ("train_tokenizer", "tokenizer.model"),
    ("train_vqvae", weights.WEIGHTS),
    ("pretrain_coglm", weights.WEIGHTS),
    ("finetune_superres/direct", weights.WEIGHTS),
    ("finetune_superres/iterative", weights.WEIGHTS),
)


@dataclass(frozen=True)
class Selected:
    """What is evaluated."""

    name: str
    run: RunDirectory
    coglm: Path | None
    """Weights of CogLM other than the run's final ones."""
    digests: dict[str, str]
    """File -> sha256 of everything that draws."""


def select_weights(context: StageContext) -> Selected:
    """Resolve evaluate.weights; collective.

    Raises:
        ConfigError: the step is no number.
        CheckpointError: no such run, stage or checkpoint.
    """
    wanted = context.recipe.evaluate.weights
    run, step = context.run, None
    if wanted is not None:
        path, at, number = wanted.rpartition("@")
        if at and not number.isdigit():
            raise ConfigError(
                f"evaluate.weights {wanted!r}: {number!r} after @ is no step; write RUN or RUN@STEP"
            )
        run, step = RunDirectory(Path(path if at else wanted)), int(number) if at else None
        run.load_recipe()
    digests = {}
    for unit, name in _READ:
        record = run.stage(unit).done()
        if record is None or f"output/{name}" not in record.outputs:
            raise CheckpointError(f"{run.path} has no finished stage {unit}; run it first")
        digests[f"{unit}/{name}"] = record.outputs[f"output/{name}"].sha256
    if step is None:
        return Selected(wanted or str(run.path.name), run, None, digests)
    exported = context.stage.path / "work" / f"coglm-{run.path.name}-{step:09d}.safetensors"
    if context.world.is_first:
        fsops.make_dirs(exported.parent)
        folder = run.stage("pretrain_coglm").checkpoints / f"step_{step:09d}"
        if not folder.is_dir():
            have = ", ".join(sorted(p.name for p in folder.parent.glob("step_*"))) or "none"
            raise CheckpointError(f"{run.path} has no checkpoint of step {step}; it has {have}")
        weights.save_weights(exported, coglm_state(folder, run.load_recipe().coglm.model), {"kind": "coglm"})
    barrier()
    digests[f"pretrain_coglm/{weights.WEIGHTS}"] = fsops.sha256_file(exported)
    return Selected(str(wanted), run, exported, digests)
