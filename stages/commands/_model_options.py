"""Which models a command uses, where and how precisely: the options that several commands share."""

import argparse
from pathlib import Path

import torch

from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.sampling.styles import NO_STYLE, load_styles
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.stages._loading import load_text_to_image

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add RUN, and options for weights, dtype and device; call it first, RUN comes before other arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="path of a run or of a weights folder")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="CogLM weights; default: the run's final ones"
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        help="of the transformers' weights; default: as stored, on a CPU float32",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="for example cpu or cuda:1; default: the first GPU, or the CPU"
    )


def add_style_options(parser: argparse.ArgumentParser) -> None:
    """Add --style and --styles, for `styles.find_style`."""
    parser.add_argument(
        "--style",
        default=NO_STYLE,
        metavar="NAME",
        help=f"{', '.join(load_styles())}, or one of --styles; default: {NO_STYLE}",
    )
    parser.add_argument("--styles", type=Path, metavar="FILE", help="YAML file of your own styles")


def load_models(arguments: argparse.Namespace, *, superres: bool) -> TextToImage:
    """Return the cascade that the options name.

    Raises:
        ConfigError: a device that is not there.
    """
    device = None
    if arguments.device is not None:
        try:
            device = torch.device(arguments.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(
                f"there is no device {arguments.device!r} here; leave --device out to take what there is"
            ) from error
    return load_text_to_image(
        arguments.run,
        device=device,
        dtype=_DTYPES.get(arguments.dtype),
        coglm_weights=arguments.weights,
        superres=superres,
    )
