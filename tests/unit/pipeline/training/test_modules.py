import numpy as np
import pytest
import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.stages import LossWeights, VQVAEStageConfig
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.objectives import direct_sr_sample, iterative_sr_sample
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.pipe import PipeBlock, PipePositions, PipeWords, init_as_pipe
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.modules import TrainModule
from cogview2.pipeline.training.optimizers import parameter_groups
from cogview2.pipeline.training.train_modules import vqvae as train_vqvae
from cogview2.pipeline.training.train_modules.coglm import CogLMTrainModule
from cogview2.pipeline.training.train_modules.sr import DirectSRTrainModule, IterativeSRTrainModule
from cogview2.pipeline.training.train_modules.vqvae import VQVAETrainModule

VOCABULARY = Vocabulary.uniform(16, 40)
CONFIG = CogLMConfig(
    layers=2, hidden=16, heads=2, max_positions=64, text_length=6, image_position=8, dropout=0.0
)


def vqvae(warm_up: int = 1, restart_after: int = 2) -> VQVAETrainModule:
    torch.manual_seed(0)
    model = VQVAEConfig(
        base_channels=4, encoder_res_blocks=1, latent_channels=4, codebook_size=8, norm_groups=2,
        decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)), encoder_multipliers=(1, 1, 1),
    )  # fmt: skip
    config = VQVAEStageConfig(
        model=model,
        loss=LossWeights(ms_ssim=0.0),
        train=TrainConfig(steps=5, global_batch=2, deepspeed="vqvae_zero1"),
        autoencoder_steps=warm_up,
        restart_after=restart_after,
    )
    return VQVAETrainModule(config, seed=3)


def test_parameter_groups_spare_vectors_and_embeddings() -> None:
    model = CogLM(CONFIG, VOCABULARY.rows)
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in plain["params"]}  # type: ignore[attr-defined]
    assert len(decayed["params"]) + len(plain["params"]) == len(names)  # type: ignore[arg-type]
    assert {"transformer.word_embeddings.weight", "transformer.position_embeddings.weight"} <= spared
    assert all("embeddings" in name or name.endswith("bias") or "layernorm" in name for name in spared)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert group["params"] == [layer.weight]


def test_a_module_must_define_its_loss() -> None:
    with pytest.raises(TypeError, match="TrainModule does not define forward"):
        TrainModule()({})
    assert TrainModule().end_step(0) == {}


def _text_batch(positions: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY.rows, (2, positions))
    return {
        "tokens": tokens,
        "position_ids": torch.arange(positions).expand(2, -1) % 24,
        "labels": tokens.roll(-1, 1) % VOCABULARY.image_codes,
        "loss_mask": torch.rand(2, positions) < 0.5,
        "loss_weights": torch.ones(2, positions),
        "roles": torch.ones(2, positions, dtype=torch.int64),
    }


def test_coglm_sums_give_the_loss_and_all_weights_learn() -> None:
    torch.manual_seed(0)
    module = CogLMTrainModule(CONFIG, VOCABULARY)
    output = module(_text_batch(22))
    torch.testing.assert_close(output.sums.sum() / output.counts.sum(), output.loss.detach())
    assert not output.sums.requires_grad and len(output.sums) == len(module.metric_names)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in module.model.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_plain_model_starts_like_the_pipelined_one(seed: int) -> None:
    torch.manual_seed(99)
    model = CogLM(CONFIG, VOCABULARY.rows)
    init_as_pipe(model, seed)
    first = seed * (CONFIG.layers + 2)
    transformer = model.transformer
    assert torch.equal(transformer.word_embeddings.weight, PipeWords(CONFIG, VOCABULARY.rows, first).weight)
    positions = PipePositions(CONFIG, first + 1).position_embeddings.weight
    assert torch.equal(transformer.position_embeddings.weight, positions)
    for number, block in enumerate(transformer.layers):
        for name, parameter in PipeBlock(CONFIG, first + 2 + number).named_parameters():
            assert torch.equal(block.get_parameter(name), parameter), name


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_superres_loss_is_over_image_codes(kind: str) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    base, fine = rng.integers(0, 16, 4), rng.integers(0, 16, 16)
    if kind == "direct":
        config = DirectSRConfig(text_length=4)
        module: TrainModule = DirectSRTrainModule(DirectSR(CONFIG, config, 2, 2, VOCABULARY.rows), VOCABULARY)
        sample = direct_sr_sample([20, 21], base, fine, config=config, coglm=CONFIG, vocabulary=VOCABULARY)
    else:
        other = IterativeSRConfig(text_length=4)
        module = IterativeSRTrainModule(IterativeSR(CONFIG, other, 4, VOCABULARY.rows), VOCABULARY)
        sample = iterative_sr_sample([20, 21], fine, rng, config=other, coglm=CONFIG, vocabulary=VOCABULARY)
    fields = ("tokens", "position_ids", "labels", "loss_mask", "roles")
    batch = {name: torch.from_numpy(getattr(sample, name))[None] for name in fields}
    output = module(batch)
    assert 0 < float(output.loss.detach()) < 2 * torch.log(torch.tensor(16.0))
    torch.testing.assert_close(output.sums[0] / output.counts[0], output.loss.detach())
    assert 0 <= float(output.sums[1]) <= float(output.counts[1]) == int(batch["loss_mask"].sum())
    output.loss.backward()


def _vqvae_step(module: VQVAETrainModule, step: int, batches: list[dict]) -> dict[str, float]:
    module.begin_step(step, batches)
    for batch in batches:
        output = module(batch)
        output.loss.backward()
        assert len(output.sums) == len(module.metric_names)
    return module.end_step(step)


def test_vqvae_warms_up_then_places_the_codebook_on_data() -> None:
    module = vqvae()
    batch = {"pixels": torch.rand(2, 3, 16, 16)}
    before = module.model.quantizer.embed.weight.clone()
    assert _vqvae_step(module, 0, [batch]) == {}
    assert torch.equal(module.model.quantizer.embed.weight, before)
    extra = _vqvae_step(module, 1, [batch])
    assert not torch.equal(module.model.quantizer.embed.weight, before)
    assert extra["codebook_perplexity"] > 1 and extra["codes_restarted"] == 0


def test_vqvae_trains_other_rates_in_every_nth_step_only() -> None:
    module = vqvae(warm_up=0)
    module.config = module.config.model_copy(update={"other_rates_every": 3})
    batch = {"pixels": torch.rand(2, 3, 16, 16)}
    names = module.metric_names
    for step in range(1, 7):
        module.zero_grad(set_to_none=True)
        module.begin_step(step, [batch])
        output = module(batch)
        output.loss.backward()
        every = step % 3 == 0
        counts = dict(zip(names, output.counts.tolist(), strict=True))
        assert (counts["l1_rate4"], counts["l1_rate8"], counts["l1_rate16"]) == (1, every, every)
        assert counts["commitment"] == (3 if every else 1)
        for rate in (4, 8, 16):
            learns = any(p.grad is not None for p in module.model.decoder(rate).parameters())
            assert learns == (every or rate == 4), (step, rate)
        left = {id(parameter) for parameter in module.unused_parameters()}
        without = {id(p) for p in module.model.parameters() if p.grad is None and p.requires_grad}
        assert left == without and bool(left) != every
        module.end_step(step)


def test_vqvae_statistics_add_up_over_micro_batches() -> None:
    pixels = torch.rand(4, 3, 16, 16)
    books = []
    for parts in (1, 2):
        module = vqvae(warm_up=0)
        with torch.no_grad():
            module.begin_step(0, [{"pixels": pixels}])
            for part in pixels.chunk(parts):
                module({"pixels": part})
        module.end_step(0)
        books.append(module.model.quantizer.embed.weight.clone())
    torch.testing.assert_close(*books)


def test_vqvae_restarts_codes_that_nobody_uses() -> None:
    module = vqvae(warm_up=0)
    batch = {"pixels": torch.full((2, 3, 16, 16), 0.5)}
    _vqvae_step(module, 0, [batch])
    with torch.no_grad():
        module.model.quantizer.embed.weight[5] = 1e3  # nothing is near
        module.model.quantizer.embed_avg[5] = 1e3
    restarted = [_vqvae_step(module, step, [batch])["codes_restarted"] for step in range(1, 5)]
    assert sum(restarted) > 0
    assert module.model.quantizer.embed.weight[5].abs().max() < 1e2
    none = vqvae(warm_up=0, restart_after=0)
    assert sum(_vqvae_step(none, step, [batch])["codes_restarted"] for step in range(5)) == 0


def test_vqvae_codebook_does_not_depend_on_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vqvae, "_INIT_LATENTS_PER_CODE", 4)
    monkeypatch.setattr(train_vqvae, "_LEAST_RESTART_LATENTS", 16)
    torch.manual_seed(1)
    pixels = [torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) for _ in range(8)]
    books, restarted = [], []
    for parts in (1, 2, 4):
        module = vqvae(restart_after=1)
        with torch.no_grad():
            for step, batch in enumerate(pixels):
                micro_batches = [{"pixels": part} for part in batch.chunk(parts)]
                module.begin_step(step, micro_batches)
                for micro_batch in micro_batches:
                    module(micro_batch)
                restarted.append(module.end_step(step).get("codes_restarted", 0.0))
                if step == 2:
                    module.model.quantizer.embed.weight[:4] = 1e3  # nothing is near
                    module.model.quantizer.embed_avg[:4] = 1e3
        books.append(module.model.quantizer.embed.weight.clone())
    assert restarted[:8] == restarted[8:16] == restarted[16:] and sum(restarted) >= 12
    torch.testing.assert_close(books[1], books[0])
    torch.testing.assert_close(books[2], books[0])


def test_vqvae_keeps_latents_only_when_a_code_may_restart() -> None:
    module = vqvae(warm_up=0, restart_after=2)
    batch = {"pixels": torch.rand(2, 3, 16, 16)}
    for idle, kept in ((0, False), (1, False), (2, True)):
        module.use.idle_steps.fill_(0)
        module.use.idle_steps[3] = idle
        module.begin_step(1, [batch])
        assert (module._candidates is not None) == kept
        module(batch)
        module.end_step(1)
        assert module._candidates is None


def test_vqvae_train_state_is_in_the_checkpoint_but_not_in_the_weights() -> None:
    module = vqvae()
    assert "use.idle_steps" in module.state_dict()
    assert not any("idle_steps" in name for name in module.model.state_dict())
