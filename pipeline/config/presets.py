"""Where the paper and the released code differ (spec 11): one table, and the two presets made from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cogview2.pipeline.config.problems import Origins
from cogview2.pipeline.config.yaml_reader import KeyPath
from cogview2.pipeline.errors import ConfigError

Preset = Literal["released", "paper"]
_PRESET_KEY: KeyPath = ("preset",)


@dataclass(frozen=True)
class Difference:
    """One point on which paper and release differ, or that one of them leaves open."""

    topic: str
    key: str | None
    """Of the recipe, dotted; None: there is no choice, and `note` says why."""
    released: Any = None
    """What the released code does; None where it does not say."""
    paper: Any = None
    """What the paper says; None where it does not."""
    note: str = ""
    spec: str = ""
    """Point of the specification."""

    def value(self, preset: Preset) -> Any:
        """Return what `preset` sets; where its source does not say, what the other one says."""
        own, other = (self.released, self.paper) if preset == "released" else (self.paper, self.released)
        return other if own is None else own


DIFFERENCES = (
    Difference(
        "window of cells in direct super-resolution, rows x columns",
        "direct_sr.model.local_kernel",
        [9, 5],
        [9, 9],
        "The release runs the full window of an operator that is shaped for the causal one.",
        spec="11.1",
    ),
    Difference(
        "window of cells in iterative super-resolution",
        "iterative_sr.model.local_kernel",
        [9, 5],
        [9, 9],
        spec="11.1",
    ),
    Difference("window of base codes", "direct_sr.model.cross_kernel", [5, 5], spec="11.1"),
    Difference(
        "order in which iterative super-resolution draws",
        "sampling.iterative.schedule",
        "released",
        "diagonal",
        "The release has a fixed 6 x 6 pattern; the paper describes a diagonal order.",
        spec="11.2",
    ),
    Difference(
        "cells that it draws again",
        "sampling.iterative.mask_ratio",
        paper=0.75,
        note="The released pattern draws 23 of 36, 64 %; the key counts for the diagonal order.",
        spec="11.2",
    ),
    Difference(
        "side of the tile of that order",
        "sampling.iterative.window",
        paper=6,
        note="In the released pattern it is 6 as well.",
        spec="11.2",
    ),
    Difference(
        "model runs of iterative super-resolution",
        "sampling.iterative.rounds",
        paper=6,
        note="11 diagonals, merged to 6; the released pattern has 6.",
        spec="11.2",
    ),
    Difference(
        "masked patches in pretraining",
        "coglm.objectives.patch_mode",
        "released",
        "paper",
        "Released: 20 corners that never reach the last row and column, 52 % of the cells; paper: until 75 %.",
        spec="11.3",
    ),
    Difference(
        "steps of CogLM",
        "coglm.train.steps",
        432_000,
        300_000,
        "The published checkpoint is of step 432,000.",
        spec="11.4",
    ),
    Difference(
        "size of the super-resolution models",
        None,
        note="Called 9B; the released classes have 7,725,895,680 and 5,913,366,528 parameters, which follow from the sizes.",
        spec="11.5",
    ),
    Difference(
        "text slots of CogLM",
        "coglm.model.text_length",
        112,
        note="The sampling script refuses more than 109 ids; here longer text is cut to what fits.",
        spec="11.6",
    ),
    Difference(
        "text slots of direct super-resolution",
        "direct_sr.model.text_length",
        96,
        note="Room for 95 ids, though CogLM may have had 109: there the release crashes, here text is cut.",
        spec="11.6",
    ),
    Difference("text ids of iterative super-resolution", "iterative_sr.model.text_length", 16, spec="11.6"),
    Difference(
        "base pictures for each prompt, of which the best by caption is kept",
        "sampling.ranking.candidates",
        1,
        note="The release scores pictures, but uses the order only without super-resolution; the paper calls ranking optional.",
        spec="11.7",
    ),
    Difference(
        "when ranking decides what goes on",
        "sampling.ranking.applies",
        "base_only",
        "always",
        "The release draws all candidates in full where there is super-resolution, and does not use their order.",
        spec="11.7",
    ),
    Difference(
        "token before the text when a caption scores a picture",
        "sampling.ranking.start",
        "chinese",
        note="The release always takes the Chinese one; without a preset it is that of the text's language, as in training.",
        spec="11.7",
    ),
    Difference(
        "ids among which a caption must be likely",
        "sampling.ranking.softmax",
        "all",
        "text",
        "The paper refers to CogView, which left the image codes out.",
        spec="11.11",
    ),
    Difference(
        "caption score over the tokens",
        "sampling.ranking.reduce",
        "mean",
        "sum",
        "The paper refers to CogView, which had the sum.",
        spec="11.11",
    ),
    Difference(
        "loss of the VQVAE",
        None,
        note="Both name L1, MS-SSIM and a perceptual term, and no weights; those of `vqvae.loss` are ours.",
        spec="11.8",
    ),
    Difference(
        "share of masked cells in training iterative super-resolution",
        "iterative_sr.model.mask_ratios",
        paper=[0.2, 0.4, 0.6, 0.8, 0.9],
        note="The training code was not released.",
        spec="11.8",
    ),
    Difference(
        "loss of direct super-resolution",
        None,
        note="The training code was not released; the paper leaves no choice: cross-entropy on all cells.",
        spec="11.8",
    ),
    Difference(
        "start of the new positions of direct super-resolution",
        "direct_sr.model.position_init",
        "tiled",
        note="The released tiling starts one row early.",
        spec="4.2",
    ),
    Difference(
        "start of the new positions of iterative super-resolution",
        "iterative_sr.model.position_init",
        "tiled",
        spec="4.2",
    ),
    Difference(
        "id in the unused text slots of super-resolution",
        None,
        note="Released: image code 0. Nothing that is used sees these slots, so no id there can change a picture.",
        spec="11.9",
    ),
    Difference(
        "attention scores in float16",
        "coglm.model.attention_pb_relax",
        0.0,
        note="PB-relax, alpha 32 in the paper of the first CogView; in the released code it is switched off.",
        spec="11.10",
    ),
    Difference(
        "layer norms in float16",
        "coglm.model.layernorm_pb_relax",
        False,
        note="As above: divided by max|x| / 8 first.",
        spec="2.2",
    ),
    Difference(
        "score of hidden keys",
        None,
        note="Released: -10000. Ours is -1e30 (float16: -65504), which gives the same weights.",
        spec="11.10",
    ),
    Difference(
        "loss normalisation of CogLM",
        "coglm.objectives.loss_normalisation",
        "batch",
        "region",
        "Over all loss positions of a micro batch, or first inside each mask region (eq. 2 of the paper).",
        spec="11.12",
    ),
    Difference(
        "a second <start_of_image> when editing",
        "sampling.editing.second_start_of_image",
        True,
        False,
        "The released template adds one to a text that gets one anyway.",
        spec="11.13",
    ),
    Difference(
        "pictures drawn for an edit",
        "sampling.editing.candidates",
        4,
        note="In the release in no order; here the best by caption score comes first.",
        spec="7",
    ),
    Difference(
        "style of a prompt",
        None,
        note="The text-to-image script adds the style `mainbody` unless told otherwise; here --style mainbody asks for it.",
        spec="3.1",
    ),
    Difference(
        "prompts beyond a multiple of 4 in super-resolution",
        None,
        note="The release drops them; here every prompt is drawn.",
        spec="11.14",
    ),
    Difference(
        "rows of the embedding under tensor parallelism",
        None,
        note="150,010 rows do not split over 4 or 8 ranks; we train with ZeRO and pipe stages, and merge parts on import.",
        spec="11.15",
    ),
    Difference(
        "unknown weights in the published archive of iterative super-resolution",
        None,
        note="Whether it holds any is not known; import names what it does not need and goes on.",
        spec="11.16",
    ),
    Difference(
        "temperature of direct super-resolution",
        "sampling.direct.temperature",
        1.0,
        note="The release passes 1.5 and then ignores it.",
        spec="3.1",
    ),
    Difference(
        "temperature of iterative super-resolution",
        "sampling.iterative.temperature",
        1.0,
        note="The release passes 1.3 and then ignores it.",
        spec="3.1",
    ),
    Difference(
        "top-k of iterative super-resolution",
        "sampling.iterative.top_k",
        [40, 40, 40, 20, 20, 10],
        note="The release passes 16 and then takes these from a table, one for each run.",
        spec="3.1",
    ),
)


def chosen(preset: Preset) -> dict[str, Any]:
    """Return every key that `preset` sets, dotted, with its value."""
    return {each.key: each.value(preset) for each in DIFFERENCES if each.key is not None}


def apply_preset(data: dict[str, Any], origins: Origins) -> None:
    """Fill the keys of the recipe's preset into `data`, in place; what the recipe or an override names stays.

    Args:
        data: the recipe as plain values, overrides included; without the key `preset` nothing happens.
        origins: gets the preset as the origin of what it sets.

    Raises:
        ConfigError: there is no such preset.
    """
    preset = data.get("preset")
    if preset is None:
        return
    if preset not in get_args(Preset):
        names = " or ".join(get_args(Preset))
        raise ConfigError(
            f"{origins.of(_PRESET_KEY)}: preset is {preset!r}; set it to {names}, or leave it out"
        )
    for key, value in chosen(preset).items():
        *sections, name = key.split(".")
        target: Any = data
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        # A section that is no mapping is refused when the recipe is checked.
        if isinstance(target, dict) and name not in target:
            target[name] = value
            origins.lines[(*sections, name)] = f"preset {preset}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)


def table() -> Iterator[str]:
    """Yield the lines of the table of docs/paper_and_release.md."""
    yield "| topic | key | released | paper | note |"
    yield "|---|---|---|---|---|"
    for each in DIFFERENCES:
        topic = each.topic.replace("<start_of_image>", "`<start_of_image>`")
        key = f"`{each.key}`" if each.key else "no choice"
        yield f"| {topic} | {key} | {_cell(each.released)} | {_cell(each.paper)} | {each.note} |"
