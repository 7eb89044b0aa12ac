"""Grids of pictures for TensorBoard, reports and people."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from cogview2.pipeline import fsops
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.process import barrier
from cogview2.pipeline.run_dir import RunDirectory, StageDirectory
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.training.metrics import MetricsWriter
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.trainer import SampleCallback
from cogview2.stages._stopping import heeding

_GAP = 2


def to_uint8(pixels_BCHW: torch.Tensor) -> np.ndarray:
    """Return float pixels in [0, 1] as uint8 [B, H, W, 3]."""
    return (pixels_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(rows: list[np.ndarray], side: int | None = None) -> np.ndarray:
    """Put pictures side by side: one row for each uint8 [B, H, W, 3], all enlarged to the same side."""
    side = side or max(row.shape[1] for row in rows)
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (side + _GAP), columns * (side + _GAP), 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            resized = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
            top, left = r * (side + _GAP), c * (side + _GAP)
            canvas[top : top + side, left : left + side] = np.asarray(resized)
    return canvas


def png_bytes(picture: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] atomically."""
    fsops.write_bytes(path, png_bytes(picture))


PROMPTS_PER_LANGUAGE = 4


def fixed_prompts(run: RunDirectory, recipe: Recipe) -> list[str]:
    """Return the captions that are drawn again and again while training: the first held-out ones of each language."""
    shards = run.stage("shard_dataset").output
    index = ShardIndex.load(shards / "held_out")
    if not len(index):  # a source of a single picture
        index = ShardIndex.load(shards / "train")
    pairs = [index.read(number) for number in range(min(len(index), PROMPTS_PER_LANGUAGE))]
    return [pair.captions[lang] for lang in recipe.data.languages for pair in pairs if lang in pair.captions]


def draw_prompts(
    stage: StageDirectory,
    cascade: TextToImage,
    prompts: list[str],
    seed: int,
    training: nn.Module | None,
    stop: StopFlag,
) -> SampleCallback:
    """Return a callback that draws `prompts` on rank 0, into samples/ and TensorBoard.

    Args:
        stage: where the pictures go.
        cascade: draws them.
        prompts: one picture each.
        seed: the same noise every time, so that the pictures differ by training alone.
        training: the model in training, set to eval meanwhile.
        stop: once it is set, nothing is drawn, and what is being drawn is given up.
    """

    def paint(step: int, writer: MetricsWriter | None) -> None:
        picture = grid([to_uint8(cascade.draw(prompts, seed).pixels("final"))], side=96)
        save_png(stage.samples / f"prompts_step_{step:09d}.png", picture)
        fsops.write_text(stage.samples / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))
        if writer is not None:
            writer.image(step, "fixed prompts", picture)
            writer.text(step, "fixed prompts", " | ".join(prompts))

    def draw(step: int, writer: MetricsWriter | None) -> None:
        if writer is not None or training is None:
            if training is not None:
                training.eval()
            try:
                with heeding(stop, cascade.coglm, cascade.direct, cascade.iterative):
                    paint(step, writer)
            finally:
                if training is not None:
                    training.train()
        if training is not None:
            watchdog.enter(watchdog.WAIT, step)
            barrier()  # the others wait here rather than in the middle of a collective of the next step

    return draw
