"""Numbers that are not finite, and spikes, judged by two ranks together: stop, skip, or go back and on without the batch."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from health_runs import GLOBAL_BATCH, KINDS, Fault, fit, lines, settings

from cogview2.pipeline.data.skipped_batches import FILE, SkippedBatches
from cogview2.pipeline.errors import RunDirectoryError
from cogview2.pipeline.models.coglm import pipe
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training import engine as engines
from cogview2.pipeline.training import health
from cogview2.pipeline.training import trainer as trainers
from cogview2.pipeline.training.state import loading

pytestmark = pytest.mark.distributed
BAD_LOSS: Fault = ("loss", math.inf)
"""Its gradients are finite."""
BAD_GRADIENT: Fault = ("gradient", math.nan)
"""In a pipeline, which has no such thing to offer, it makes the loss NaN."""
SPIKE: Fault = ("loss", 100.0)
Results = dict[str, Any]
Case = Callable[..., Results]
"""(folder, kind of engine, rank, only): trains several times in a folder of its own; `only` names the parts that are wanted."""
LIMIT = 400


def _stage(folder: Path, name: str) -> StageDirectory:
    return StageDirectory(folder / name, "pretrain_coglm").create()


def _stop(folder: Path, kind: str, rank: int, only: str = "") -> Results:
    train = settings(folder, kind)
    return {
        name: fit(kind, train, _stage(folder, name), {3: fault}, rank)
        for name, fault in (("loss", BAD_LOSS), ("gradient", BAD_GRADIENT))
        if not only or name in only
    }


def _skip(folder: Path, kind: str, rank: int, only: str = "") -> Results:
    train = settings(folder, kind, every=4, on_not_finite="skip", max_skipped=2)
    cases: dict[str, dict[int, Fault]] = {
        "loss": {3: BAD_LOSS},
        "gradient": {3: BAD_GRADIENT},
        "three in a row": {2: BAD_LOSS, 3: BAD_GRADIENT, 4: BAD_LOSS},
    }
    return {
        name: fit(kind, train, _stage(folder, name), faults, rank)
        for name, faults in cases.items()
        if not only or name in only
    }


def _rewind(folder: Path, kind: str, rank: int, only: str = "", *, asynchronous: bool = False) -> Results:
    """Train with a bad batch 5: through, stopped after going back and resumed, and with batch 5 left out from the start."""
    train = settings(folder, kind, on_not_finite="rewind", asynchronous=asynchronous)
    stages = {name: _stage(folder, name) for name in ("through", "resumed", "clean")}
    if rank == 0:
        _known_before(stages["clean"])
    faults: dict[int, Fault] = {5: BAD_LOSS if kind == "zero1" else BAD_GRADIENT}
    results = {}
    if not only or "resumed" in only:
        results["stopped"] = fit(kind, train, stages["resumed"], faults, rank, reads=8)
    wanted = {name: stage for name, stage in stages.items() if not only or name in only}
    return results | {name: fit(kind, train, stage, faults, rank) for name, stage in wanted.items()}


def _known_before(stage: StageDirectory) -> None:
    entry = {"number": 5, "step": 6, "reason": "known before", "samples": []}
    (stage.path / FILE).write_text(json.dumps({"format": 1, "batches": [entry]}))


def _no_space(self: SkippedBatches, path: Path) -> None:
    raise RunDirectoryError(f"cannot write {path}: the disk is full")


_write = SkippedBatches.write


def _write_and_die(self: SkippedBatches, path: Path) -> None:
    _write(self, path)
    raise RunDirectoryError("killed")


def _limits(folder: Path, kind: str, rank: int) -> Results:
    train = settings(folder, kind, on_not_finite="rewind", max_skipped=2)
    skip = settings(folder, kind, every=4, on_not_finite="skip")
    with mock.patch.object(SkippedBatches, "write", _no_space):
        full = fit(kind, train, _stage(folder, "full"), {5: BAD_GRADIENT}, rank)
    killed = _stage(folder, "killed")
    with mock.patch.object(SkippedBatches, "write", _write_and_die):
        fit(kind, train, killed, {5: BAD_GRADIENT}, rank)
    often = _stage(folder, "often")
    faults: dict[int, Fault] = {number: BAD_GRADIENT for number in (5, 6, 7)}
    return {
        "early": fit(kind, train, _stage(folder, "early"), {1: BAD_GRADIENT}, rank),
        "often": fit(kind, train, often, faults, rank),
        "again": fit(kind, train, often, faults, rank),
        "full": full,
        "killed": fit(kind, train, killed, {5: BAD_GRADIENT}, rank),
        "stopped": fit(kind, skip, _stage(folder, "stopped"), {3: BAD_LOSS}, rank, reads=4),
    }


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _spikes(folder: Path, kind: str, rank: int, only: str = "") -> Results:
    faults: dict[int, Fault] = {5: SPIKE, 6: SPIKE}
    train = {name: settings(folder, kind, on_spike=name) for name in ("log", "rewind")}
    resumed, said = _stage(folder, "resumed"), _Collect()
    results = {}
    with mock.patch.object(health, "WINDOW", 4):
        logging.getLogger(trainers.__name__).addHandler(said)
        if not only:
            results = {name: fit(kind, train[name], _stage(folder, name), faults, rank) for name in train}
            results["log"]["said"] = [line for line in said.lines if "it read batch" in line]
        logging.getLogger(trainers.__name__).removeHandler(said)
        fit(kind, train["rewind"], resumed, faults, rank, reads=4)
        results["resumed"] = fit(kind, train["rewind"], resumed, faults, rank)
    return results


CASES: dict[str, Case] = {
    f"{case.__name__} {kind}": functools.partial(case, kind=kind)
    for case in (_stop, _skip, _rewind, _limits, _spikes)
    for kind in KINDS
    if case is not _limits or kind == "zero0"
} | {"_rewind asynchronous": functools.partial(_rewind, kind="zero1", asynchronous=True)}


def _in_spite_of_a_bad_step(self: trainers.Trainer, done: int, step: Any) -> None:
    _after_step(self, done, dataclasses.replace(step, finite=True))


_after_step = trainers.Trainer._after_step


class _AlwaysApplied(engines._Update):
    applied = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


Patch = tuple[Any, str, Any]
MUTANTS: dict[str, tuple[Case, str, str, Patch]] = {
    "each rank for itself": (
        _stop,
        "zero0",
        "loss",
        (trainers, "gather_rows", lambda row: torch.stack([row, row])),
    ),
    "gradients stay": (_skip, "zero0", "gradient", (engines, "_drop_unless_finite", lambda *_: None)),
    "an infinite loss keeps its gradient": (
        _skip,
        "zero1",
        "loss gradient",
        (engines, "spoil_gradient", lambda loss: None),
    ),
    "so does that of a pipeline": (
        _skip,
        "pipe",
        "loss gradient",
        (pipe, "spoil_gradient", lambda loss: None),
    ),
    "bad steps are saved": (
        _skip,
        "zero0",
        "loss",
        (trainers.Trainer, "_after_step", _in_spite_of_a_bad_step),
    ),
    "modules end a bad step": (_skip, "zero0", "loss", (engines, "_Update", _AlwaysApplied)),
    "no list is written": (
        _rewind,
        "zero0",
        "resumed",
        (SkippedBatches, "write", lambda self, path: None),
    ),
    "random state stays": (
        _rewind,
        "zero0",
        "through clean",
        (loading, "load_random_state", lambda state: None),
    ),
    "losses are not restored": (
        _spikes,
        "zero0",
        "resumed",
        (health.Health, "load", lambda self, state: None),
    ),
}
"""Name -> what is trained, the engine, which parts of it, and the protection that is switched off."""


def _run(folder: Path, work: Callable[[int], dict[str, Results]]) -> dict[str, Results]:
    """Return rank 0's results, with what both ranks said as `errors`, and what is on disk."""
    first, second = run_ranks(work, 2, limit=LIMIT)
    for name, results in first.items():
        for part, result in results.items():
            result["errors"] = result["error"] + second[name][part]["error"]
            path = folder / name / part
            if path.exists():
                result["lines"] = lines(_stage(folder / name, part))
                result["list"] = SkippedBatches.read(path / FILE).entries
    return dict(first)


def _folder(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    return root / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    root = tmp_path_factory.mktemp("runs")
    return _run(
        root,
        lambda rank: {name: case(_folder(root, name), rank=rank) for name, case in CASES.items()},
    )


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    root = tmp_path_factory.mktemp("mutants")

    def work(rank: int) -> dict[str, Results]:
        results = {}
        for name, (case, kind, only, patch) in MUTANTS.items():
            with mock.patch.object(*patch):
                results[name] = case(_folder(root, name), kind, rank, only)
        return results

    return _run(root, work)


def _same(one: Results, other: Results) -> bool:
    assert one["state"].keys() == other["state"].keys() and one["state"]
    return all(np.array_equal(one["state"][name], other["state"][name]) for name in one["state"])


def _finite(result: Results) -> bool:
    return all(np.isfinite(value).all() for value in result["state"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_stop_is_one_error_on_all_ranks_and_nothing_is_saved_after_it(
    runs: dict[str, Results], kind: str
) -> None:
    for name, result in runs[f"_stop {kind}"].items():
        loss_is_fine = name == "gradient" and kind != "pipe"
        what = "the gradients of step 4 are not finite" if loss_is_fine else "the loss of step 4 is"
        for error in result["errors"]:
            assert error.startswith(f"NumericError: {what}") and "train.health.on_not_finite" in error, error
        assert result["saved"] == [2] and result["read"] == [0, 1, 2, 3]
        assert _finite(result)


@pytest.mark.parametrize("kind", KINDS)
def test_skip_applies_the_update_nowhere_and_saves_nothing_until_a_step_is_good(
    runs: dict[str, Results], kind: str
) -> None:
    results = runs[f"_skip {kind}"]
    for name in ("loss", "gradient"):
        result = results[name]
        assert result["errors"] == ["", ""] and result["read"] == list(range(8)) and _finite(result)
        assert [step for step, _ in result["lines"]] == [1, 2, 3, 5, 6, 7, 8]
        assert result["saved"] == [5, 8]
        assert result["state"].get("updates", 7) == 7  # what learns without gradients is left out too
    # An infinite loss with finite gradients is left out as one with gradients that are not finite.
    assert _same(results["loss"], results["gradient"])
    assert results["loss"]["lines"] == results["gradient"]["lines"]
    for error in results["three in a row"]["errors"]:
        assert error.startswith("NumericError: the loss of step 5 is inf, after 2 skipped steps in a row"), (
            error
        )
    assert results["three in a row"]["saved"] == []


def test_mutant_of_stop(mutants: dict[str, Results]) -> None:
    first, second = mutants["each rank for itself"]["loss"]["errors"]
    assert "the loss of step 4" in second and "the loss of step 4" not in first


def test_mutants_of_skip(mutants: dict[str, Results]) -> None:
    broken = mutants["gradients stay"]["gradient"]
    # From then on every step is bad, and none of them is saved.
    assert not _finite(broken) and all(
        "after 2 skipped steps in a row" in error for error in broken["errors"]
    )
    assert broken["saved"] == []
    for name in ("an infinite loss keeps its gradient", "so does that of a pipeline"):
        assert not _same(mutants[name]["loss"], mutants[name]["gradient"])
    assert mutants["bad steps are saved"]["loss"]["saved"] == [4, 8]
    assert mutants["modules end a bad step"]["loss"]["state"]["updates"] == 8


@pytest.mark.parametrize("kind", [*KINDS, "asynchronous"])
def test_rewind_leaves_the_batch_out_and_equals_a_run_that_never_had_it(
    runs: dict[str, Results], kind: str
) -> None:
    results = runs[f"_rewind {kind}"]
    through, clean = results["through"], results["clean"]
    # Steps 5 and 6 again from the checkpoint of step 4; batch 5 is not read a second time.
    assert through["read"] == [0, 1, 2, 3, 4, 5, 4, 6, 7, 8]
    assert [step for step, _ in through["lines"]] == list(range(1, 9))
    assert clean["read"] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert results["resumed"]["read"] == [7, 8]
    for error in results["stopped"]["errors"]:
        assert error.startswith("Preempted: ") and "after step 6" in error
    for name in ("through", "resumed"):
        result = results[name]
        assert result["errors"] == ["", ""] and _finite(result)
        assert _same(result, clean) and result["lines"] == clean["lines"]
        (entry,) = result["list"]
        assert (entry.number, entry.step) == (5, 6) and "step 6" in entry.reason
        assert len(entry.samples) == GLOBAL_BATCH and entry.samples[0].startswith("sample")
    assert through["consumed"] == clean["consumed"] == 9 * GLOBAL_BATCH


def test_mutants_of_rewind(mutants: dict[str, Results]) -> None:
    results = mutants["no list is written"]
    # Without it the resumed job finds that the checkpoint stands elsewhere in the data.
    assert all(error.startswith("DataError: ") and FILE in error for error in results["resumed"]["errors"])
    results = mutants["random state stays"]
    assert not _same(results["through"], results["clean"])


def test_rewind_needs_a_checkpoint_and_has_a_limit(runs: dict[str, Results]) -> None:
    results = runs["_limits zero0"]
    for error in results["early"]["errors"]:
        assert error.startswith(
            "NumericError: the gradients of step 2 are not finite, and there is no checkpoint"
        ), error
    assert not results["early"]["list"]
    for name in ("often", "again"):
        for error in results[name]["errors"]:
            assert "after 2 batches were left out since the checkpoint of step 4" in error
    # Starting again does not begin to count anew.
    assert results["often"]["read"] == [0, 1, 2, 3, 4, 5, 4, 6, 4, 7]
    assert results["again"]["read"] == [4, 7]
    assert [entry.number for entry in results["often"]["list"]] == [5, 6]


def test_a_list_that_cannot_be_written_is_one_error_on_all_ranks(runs: dict[str, Results]) -> None:
    result = runs["_limits zero0"]["full"]
    assert all(error.startswith("RunDirectoryError: cannot write ") for error in result["errors"])
    assert result["saved"] == [2, 4] and result["read"] == [0, 1, 2, 3, 4, 5]


def test_a_job_that_dies_before_it_is_back_goes_on_in_the_same_way(runs: dict[str, Results]) -> None:
    result, clean = runs["_limits zero0"]["killed"], runs["_rewind zero0"]["clean"]
    assert result["read"] == [4, 6, 7, 8]
    assert _same(result, clean) and result["lines"] == clean["lines"]


def test_a_stop_in_a_bad_step_waits_for_a_good_one(runs: dict[str, Results]) -> None:
    result = runs["_limits zero0"]["stopped"]
    assert all("after step 5, which is saved" in error for error in result["errors"])
    assert result["saved"] == [5] and result["read"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_spikes_are_said_or_left_out(runs: dict[str, Results], kind: str) -> None:
    results = runs[f"_spikes {kind}"]
    assert all(result["errors"] == ["", ""] for result in results.values())
    assert results["log"]["read"] == list(range(8))
    (said,) = results["log"]["said"]
    assert said.startswith("the loss of step 6 is ") and "sigma" in said and said.endswith("it read batch 5")
    assert results["rewind"]["read"] == [0, 1, 2, 3, 4, 5, 4, 6, 4, 7, 8, 9]
    assert [entry.number for entry in results["rewind"]["list"]] == [5, 6]
    # The losses of the window are part of the checkpoint.
    assert results["resumed"]["read"] == [4, 5, 4, 6, 4, 7, 8, 9]
    assert _same(results["rewind"], results["resumed"])


def test_mutant_of_spikes(mutants: dict[str, Results]) -> None:
    assert mutants["losses are not restored"]["resumed"]["read"] == [4, 5, 6, 7]
