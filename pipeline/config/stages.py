"""The six stages' sections of a recipe, the recipe itself, and the table of stages."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.config.launch import LaunchConfig
from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.presets import Preset
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.config.training import TrainConfig

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class TokenizerConfig(Config):
    """Stage train_tokenizer: SentencePiece unigram (spec 1.2)."""

    character_coverage: Annotated[float, Field(gt=0.9, le=1)] = 0.9995
    num_threads: Positive = 1
    """Changes the vocabulary, so it is fixed and recorded."""
    input_sentences: Positive = 10_000_000
    """Sentences sampled from the corpus."""
    seed_pieces: Positive = 1_000_000
    shrink_to_fit: bool = False
    """Train as many pieces as the corpus supports when text_pieces is too many; the id layout keeps its width."""
    rare_frequency: Annotated[float, Field(ge=0)] = 0.0
    """Pieces outside English, Chinese and punctuation, and pieces rarer than this share of the corpus, are `rare`."""
    take_from: str | None = None
    """A run or a weights folder whose tokenizer is taken as it is; nothing is trained."""


class LossWeights(Config):
    """Weights of the VQVAE's loss terms (spec 1.3; the weights were never published)."""

    l1: Weight = 1.0
    l2: Weight = 0.0
    """Mean squared error. Alone, L1 learns hues late: where they vary, its minimum is their grey median."""
    ms_ssim: Weight = 1.0
    perceptual: Weight = 1.0
    commitment: Weight = 1.0


class VQVAEStageConfig(Config):
    """Stage train_vqvae."""

    model: VQVAEConfig = VQVAEConfig()
    train: TrainConfig
    loss: LossWeights = LossWeights()
    image_sizes: tuple[Literal["base", "superres", "crop"], ...] = ("base", "crop")
    """Kinds of training pictures, in turn: the whole at base size, the whole at full size, a base-size crop of the full size."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    restart_after: Annotated[int, Field(ge=0)] = 50
    """Steps without use after which a code is set to a latent of the batch; 0 never."""
    other_rates_every: Positive = 1
    """Rates other than data.compression_rate are trained in every n-th step; 1, every step, as published. The loss of a
    step is that of its rates, so train.log_every should be a multiple."""
    autoencoder_steps: Annotated[int, Field(ge=0)] = 0
    """First steps without quantization; the codebook is initialised from data right after them."""
    take_from: str | None = None
    """A run or a weights folder whose VQVAE is taken as it is; nothing is trained."""
    init_from: str | None = None
    """A run or a weights folder with whose VQVAE training starts."""
    perceptual_network: str | None = None
    """Path of VGG16 weights (docs/evaluation.md); without one a named gradient loss takes its place, said aloud."""


class ShardStageConfig(Config):
    """Stage shard_dataset."""

    samples_per_shard: Positive = 1000
    vqvae_batch: Positive = 32


class ObjectiveConfig(Config):
    """Mixture of the training objectives (spec 2.6)."""

    text_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pure-text samples in a batch."""
    caption_ratio: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Of the text-image samples, the share trained as captioning with masked patches; the rest as generation."""
    captions_per_row: Literal["all", "one"] = "all"
    """Captions that share the text slots of a sample: every language (as published), or one drawn at random."""
    patch_mode: Literal["released", "paper"] = "released"
    """Masked 4x4 patches: a fixed number (released, about 52 % of the image), or until 75 % is covered (paper)."""
    loss_normalisation: Literal["batch", "region"] = "batch"
    """Mean of the loss over all loss positions of the micro batch (released), or first over each mask region (paper)."""
    caption_end: bool = False
    """Also predict a <pad> after the last token of a caption, so that captioning knows where to stop (published: no)."""
    history_mask: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the generation samples in which some codes are hidden as inputs (published: 0). A hidden code cannot be
    guessed from its neighbours, only from the text: small models obey captions sooner."""


class CogLMStageConfig(Config):
    """Stage pretrain_coglm."""

    model: CogLMConfig = CogLMConfig()
    objectives: ObjectiveConfig = ObjectiveConfig()
    init_from: str | None = None
    """A run or a weights folder with whose CogLM training starts."""
    train: TrainConfig


class DirectSRStageConfig(Config):
    """First half of stage finetune_superres."""

    model: DirectSRConfig = DirectSRConfig()
    init_from: str | None = None
    """A run or a weights folder with whose direct SR training starts; by default this run's CogLM (spec 4.2)."""
    train: TrainConfig


class IterativeSRStageConfig(Config):
    """Second half of stage finetune_superres."""

    model: IterativeSRConfig = IterativeSRConfig()
    init_from: str | None = None
    """A run or a weights folder with whose iterative SR training starts; by default see `model.init`."""
    train: TrainConfig


class EvaluateConfig(Config):
    """Stage evaluate (spec 9)."""

    captions: Positive = 200
    """Held-out captions per language, one picture each."""
    weights: str | None = None
    """`RUN` or `RUN@step` whose CogLM is evaluated; by default this run's final weights."""
    blur_radii: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 4, 8)
    feature_network: str | None = None
    """Path of Inception weights; without one a small network whose figures are not comparable to papers."""
    resize: Literal["tf1", "clean", "antialias"] = "tf1"
    allow_few: bool = False
    """Report a Frechet distance from fewer pictures than feature dimensions, labelled."""
    classifier_steps: Positive = 200
    """Training steps of the drawings' attribute classifier."""
    chunk: Positive = 25
    """Captions drawn together; the unit of work of a rank and of resume."""
    described: Annotated[int, Field(ge=0)] = 100
    """Held-out pictures that CogLM describes, in each language."""
    ranked: Annotated[int, Field(ge=0)] = 0
    """Held-out captions, in each language, for which several base pictures are drawn and ranked by caption score."""
    ranking_candidates: Annotated[int, Field(ge=2)] = 4
    """Base pictures for each of them."""
    edited: Annotated[int, Field(ge=0)] = 0
    """Held-out drawings, in each language, of which one object is replaced; generated drawings only."""


class Recipe(Config):
    """One whole cascade."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    preset: Preset | None = None
    """Sets what this recipe does not name itself and on which paper and release differ (docs/paper_and_release.md)."""
    launch: LaunchConfig = LaunchConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    vqvae: VQVAEStageConfig
    shards: ShardStageConfig = ShardStageConfig()
    coglm: CogLMStageConfig
    direct_sr: DirectSRStageConfig
    iterative_sr: IterativeSRStageConfig
    sampling: SamplingConfig = SamplingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _pipeline_parallel(self) -> "Recipe":
        for name, train in (
            ("vqvae", self.vqvae.train),
            ("direct_sr", self.direct_sr.train),
            ("iterative_sr", self.iterative_sr.train),
        ):
            if train.pipeline_parallel != 1:
                raise ValueError(
                    f"{name}.train.pipeline_parallel {train.pipeline_parallel}: only coglm can have pipe stages; use 1"
                )
        return self

    @model_validator(mode="after")
    def _positions(self) -> "Recipe":
        needed = self.coglm.model.image_position + 1 + self.data.base_grid**2
        if self.coglm.model.max_positions < needed:
            raise ValueError(
                f"coglm.model.max_positions {self.coglm.model.max_positions} is too few: "
                f"image_position + 1 + base grid of {self.data.base_grid}x{self.data.base_grid} needs {needed}"
            )
        return self

    @model_validator(mode="after")
    def _text(self) -> "Recipe":
        weight = self.coglm.objectives.text_weight
        if weight and not any(corpus.for_objective for corpus in self.data.text):
            raise ValueError(
                f"coglm.objectives.text_weight {weight} needs a corpus of data.text with for_objective; "
                "name one, or set the weight to 0"
            )
        return self


STAGES: dict[str, tuple[str, ...]] = {
    "train_tokenizer": ("data", "tokenizer", "coglm.model.vocabulary", "vqvae.model.codebook_size"),
    "train_vqvae": ("data", "vqvae"),
    "shard_dataset": ("data", "shards", "coglm.model.text_length", "coglm.model.vocabulary"),
    "pretrain_coglm": ("coglm",),
    "finetune_superres": ("direct_sr", "iterative_sr"),
    "evaluate": ("data", "sampling", "evaluate"),
}
"""Stage name -> the parts of the recipe that it depends on (with the seed and the outputs of the stages before it).
The module of a stage is cogview2.stages.<name>."""
