"""`cogview2 status`: what a running stage measures stands in its row."""

from pathlib import Path

from cogview2.launch.status import speed, table
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.errors import ExitCode
from cogview2.pipeline.run_dir import RunDirectory

METERS = {"images_per_second": 24.0, "model_tflops": 412.3, "mfu": 0.413, "slowest_ratio": 1.42}


def test_rates_time_left_and_the_slowest_rank(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run").create(load_recipe("quickstart", []))
    stage = run.stage("pretrain_coglm").create()
    attempt = stage.new_attempt()
    stage.write_heartbeat(
        300,
        1000,
        loss=4.5,
        throughput=12288.0,
        unit="tokens/s",
        eta_seconds=18720,
        meters=METERS,
        slowest="rank 3 on node2",
    )
    with stage.lock("rank 0"):
        shown = table(run)
    head, row = (line for line in shown.splitlines() if line.startswith(("stage", "pretrain_coglm")))
    assert head.split() == ["stage", "state", "step", "loss", "speed", "eta", "wall"]
    for words in (
        "running",
        "300/1000",
        "12k tokens/s, 24 images/s, 412 TFLOP/s, 41% MFU, slowest: rank 3 on node2 (1.42x)",
        "5 h 12 min",
    ):
        assert words in row
    assert shown.splitlines()[-1].startswith(
        "cascade eta ~5 h 1"
    )  # 412 TFLOP/s: the small models take no time
    # Nobody waits for the end of what stands still.
    attempt.write_result(1, 60.0)
    row = next(line for line in table(run).splitlines() if line.startswith("pretrain_coglm"))
    assert "interrupted" in row and "5 h 12 min" not in row and "12k tokens/s" in row


def test_a_stage_that_failed_says_why_and_one_that_was_stopped_does_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run").create(load_recipe("quickstart", []))
    attempt = run.stage("train_vqvae").create().new_attempt()
    attempt.write_outcome(1, "NumericError", ExitCode.NUMERIC, 36, "the loss of step 36 is nan", at=5.0)
    attempt.write_outcome(0, "lost_peer", ExitCode.FAILED, 36, "rank 1 failed before", at=6.0)
    attempt.write_result(70, 60.0)
    shown = table(run).splitlines()
    assert any(line.startswith("train_vqvae        failed") for line in shown)
    assert shown[-1] == (
        f"train_vqvae: rank 1 at step 36: NumericError: the loss of step 36 is nan; logs: {attempt.path}"
    )
    again = run.stage("train_vqvae").new_attempt()
    again.write_outcome(0, "preempted", ExitCode.REQUEUE, 40, "stopped by SIGTERM", at=7.0)
    again.write_result(75, 60.0)
    shown = table(run).splitlines()
    assert any(line.startswith("train_vqvae        interrupted") for line in shown)
    assert not any("logs: " in line for line in shown)


def test_without_a_rate_there_is_no_speed(tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path / "run").create(load_recipe("quickstart", [])).stage("train_tokenizer")
    stage.create().write_heartbeat(0, 1, message="SentencePiece")
    assert speed(stage.heartbeat()) == "" and speed(None) == ""
