"""Work that draws is given up at the next run of its model; training models are left as they were."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cogview2.pipeline.errors import Preempted
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.stages._pictures import draw_prompts
from cogview2.stages._stopping import heeding, meet


def set_flag(stop: StopFlag) -> StopFlag:
    stop._name = "SIGTERM"
    return stop


def test_a_loop_is_left_at_the_next_run_of_a_model() -> None:
    stop, model, runs = StopFlag(), nn.Linear(1, 1), 0
    with heeding(stop, model, None):
        for runs in range(10):  # noqa: B007 - read below
            if runs == 4:
                set_flag(stop)
            model(torch.zeros(1))
    assert runs == 4
    model(torch.zeros(1))  # afterwards it is a model like any other


def test_what_the_work_raises_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), heeding(StopFlag()):
        _ = 1 / 0


def test_meeting_alone() -> None:
    stop = StopFlag()
    meet(stop, "between two things")
    with pytest.raises(Preempted, match="stopped by SIGTERM between two things"):
        meet(set_flag(stop), "between two things")


class Cascade:
    """Draws by running its model ten times; a signal comes at the third."""

    def __init__(self, stop: StopFlag) -> None:
        self.coglm, self.direct, self.iterative, self.stop, self.runs = nn.Linear(1, 1), None, None, stop, 0

    def draw(self, prompts: list[str], seed: int) -> Any:
        for self.runs in range(1, 11):
            self.coglm(torch.zeros(1))
            if self.runs == 3:
                set_flag(self.stop)
        return SimpleNamespace(pixels=lambda _: torch.zeros(len(prompts), 3, 8, 8))


def test_pictures_drawn_on_the_way_are_given_up(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path, "pretrain_coglm").create()
    stop, training = StopFlag(), nn.Dropout()
    cascade: Any = Cascade(stop)
    writer: Any = SimpleNamespace(image=lambda *_: None, text=lambda *_: None)
    draw_prompts(stage, cascade, ["a"], 0, training, stop)(5, writer)
    assert cascade.runs == 4 and not list(stage.samples.iterdir())
    assert training.training
    draw_prompts(stage, cascade, ["a"], 0, training, StopFlag())(5, writer)
    assert cascade.runs == 10 and (stage.samples / "prompts_step_000000005.png").is_file()
