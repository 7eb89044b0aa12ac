"""An interrupted stage, started again by the same command, ends exactly as one that ran straight through."""

from pathlib import Path

import pytest
import torch
from tiny_runs import Ranks, copy, digests, metrics, new_run, override, run_stage

from cogview2.pipeline.errors import ExitCode
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.extract import trained_weights
from cogview2.pipeline.weights.files import load_into, load_weights

pytestmark = pytest.mark.distributed
# The tiny recipe trains with Muon under ZeRO 0; these are partitioned and need AdamW.
PIPE = (
    "coglm.train.deepspeed=coglm_tiny_pp",
    "coglm.train.pipeline_parallel=2",
    "coglm.train.optimizer.kind=adamw",
)
ZERO1 = ("coglm.train.deepspeed=debug", "coglm.train.optimizer.kind=adamw")
VQVAE_ZERO1 = ("vqvae.train.deepspeed=vqvae_zero1", "vqvae.train.optimizer.kind=adamw")
WEIGHTS = "weights.safetensors"


def _interrupt(run: RunDirectory, stage: str, ranks: int, how: str) -> int:
    """Stop the stage soon after its first checkpoint; return the newest step that is saved."""
    checkpoints = run.stage(stage).checkpoints
    job = Ranks(run, stage, ranks).when(lambda: (checkpoints / "step_000000004").is_dir())
    if how == "SIGTERM":
        # To the last rank alone: all must learn of it and stop at the same step.
        assert job.terminate(ranks - 1) == [ExitCode.REQUEUE] * ranks, job.logs()
    else:
        job.kill()
    assert run.stage(stage).done() is None
    return max(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))


def _compare(straight: RunDirectory, resumed: RunDirectory, stage: str) -> None:
    assert metrics(resumed, stage) == metrics(straight, stage)
    assert digests(resumed.stage(stage).output) == digests(straight.stage(stage).output)


@pytest.mark.parametrize(
    ("ranks", "how", "settings"),
    [
        pytest.param(2, "SIGTERM", (), id="two ranks"),
        pytest.param(1, "SIGKILL", (), id="one rank", marks=pytest.mark.slow),
        pytest.param(2, "SIGKILL", VQVAE_ZERO1, id="ZeRO 1", marks=pytest.mark.slow),
    ],
)
def test_train_vqvae(tmp_path: Path, ranks: int, how: str, settings: tuple[str, ...]) -> None:
    # Lines every 5 steps, checkpoints every 2: the sums of a line must survive too.
    settings = ("vqvae.train.steps=16", "vqvae.train.log_every=5", *settings)
    straight, resumed = (new_run(tmp_path / name, *settings) for name in ("straight", "resumed"))
    assert 4 <= _interrupt(resumed, "train_vqvae", ranks, how) < 16
    run_stage(resumed, "train_vqvae", ranks)
    run_stage(straight, "train_vqvae", ranks)
    _compare(straight, resumed, "train_vqvae")


@pytest.mark.parametrize(
    ("ranks", "how", "settings"),
    [
        pytest.param(1, "SIGTERM", (), id="one rank", marks=pytest.mark.slow),
        pytest.param(2, "SIGKILL", (), id="two ranks", marks=pytest.mark.slow),
        pytest.param(2, "SIGTERM", ZERO1, id="ZeRO 1", marks=pytest.mark.slow),
        pytest.param(2, "SIGTERM", PIPE, id="two pipe stages", marks=pytest.mark.slow),
    ],
)
def test_pretrain_coglm(
    sharded_run: RunDirectory, tmp_path: Path, ranks: int, how: str, settings: tuple[str, ...]
) -> None:
    settings = ("coglm.train.steps=40", "coglm.train.log_every=3", *settings)
    straight = override(sharded_run, *settings)
    resumed = copy(straight, tmp_path / "resumed", until="shard_dataset")
    assert 4 <= _interrupt(resumed, "pretrain_coglm", ranks, how) < 40
    run_stage(resumed, "pretrain_coglm", ranks)
    run_stage(straight, "pretrain_coglm", ranks)
    _compare(straight, resumed, "pretrain_coglm")


@pytest.mark.slow
def test_two_pipe_stages_train_as_the_plain_model(sharded_run: RunDirectory, tmp_path: Path) -> None:
    # The same micro batches in both: a loss is a mean over micro batches of means over their positions.
    plain = override(sharded_run, "coglm.model.dropout=0", "coglm.train.steps=3", PIPE[0], PIPE[2])
    piped = override(copy(plain, tmp_path / "piped", until="shard_dataset"), PIPE[1])
    run_stage(plain, "pretrain_coglm", 1)
    run_stage(piped, "pretrain_coglm", 2)
    lines = [metrics(run, "pretrain_coglm") for run in (plain, piped)]
    for step, (one, two) in enumerate(zip(*lines, strict=True), start=1):
        for key in ("loss", "loss_image", "grad_norm"):
            assert float.fromhex(two[key]) == pytest.approx(
                float.fromhex(one[key]), rel=1e-5 if step == 1 else 1e-3
            ), key
    recipe = piped.load_recipe()
    rows = Vocabulary.load(piped.stage("train_tokenizer").output / "vocabulary.json").rows
    exported = piped.stage("pretrain_coglm").output / WEIGHTS
    load_into(CogLM(recipe.coglm.model, rows), exported)
    weights, reference = load_weights(exported), load_weights(plain.stage("pretrain_coglm").output / WEIGHTS)
    for name, tensor in reference.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-3, rtol=0, msg=name)
    for run in (plain, piped):  # what is inside the last checkpoint is what was exported
        inside = trained_weights(run.stage("pretrain_coglm").checkpoints / "step_000000003")
        own = load_weights(run.stage("pretrain_coglm").output / WEIGHTS)
        assert inside.keys() == own.keys()
        assert all(torch.equal(inside[name], own[name]) for name in own)
