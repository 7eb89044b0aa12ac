"""What a plan says that a forward pass keeps is what autograd saves, to the byte, where the CPU runs the same kernels."""

from collections.abc import Callable

import pytest
import torch
from small_networks import build, inputs, small_recipe

from cogview2.launch.plan import activations as plan
from cogview2.launch.plan.setup import Setup
from cogview2.pipeline.config import cost, cost_vqvae
from cogview2.pipeline.models.coglm import chunked_cross_entropy
from cogview2.pipeline.models.vqvae.losses import VGG_CHANNELS, VGGPerceptual, _vgg_shapes

BATCH = 2
FP32 = Setup(1, 0, 1, BATCH, 1, 0, "fp32", "fp32", "fp32")


def _saved_bytes(forward: Callable[[], object], module: torch.nn.Module) -> int:
    """Bytes of the distinct memory that autograd keeps for the backward pass, without the module's own."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # else an address may be used twice
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())
    return sum(size for address, size in found.items() if address not in own)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("unit", [cost.COGLM, cost.DIRECT, cost.ITERATIVE])
def test_transformers_keep_what_the_formula_says(unit: str, frozen: bool) -> None:
    for layers in (2, 5):
        recipe = small_recipe(
            "coglm.model.dropout=0",
            f"coglm.model.layers={layers}",
            f"direct_sr.model.freeze_base={str(frozen).lower()}",
        )
        model, arguments = build(recipe, unit).train(), inputs(recipe, unit, BATCH)
        found = _saved_bytes(lambda: model(*arguments), model)  # noqa: B023 - called before the next turn
        assert found == plan.activations(recipe, unit, FP32, device="cpu").kept


@pytest.mark.parametrize("rates", [(4, 8, 16), (8,)])
def test_vqvae_keeps_what_the_formula_says(rates: tuple[int, ...]) -> None:
    recipe = small_recipe()
    model = build(recipe, cost.VQVAE)
    pixels = torch.rand(BATCH, 3, 64, 64)

    def forward() -> list[torch.Tensor]:
        features, results = model.enc(pixels), []
        for index, rate in enumerate((4, 8, 16)[: (4, 8, 16).index(max(rates)) + 1]):
            features = model.down_samplers[index - 1](features) if index else features
            if rate in rates:
                results.append(model.decoder(rate)(model.quantize.proj(features)))
        return results

    found = _saved_bytes(forward, model)
    kept = 4 * BATCH * sum(layer.kept for layer in cost_vqvae.training_layers(recipe.vqvae.model, 64, rates))
    # The formula leaves out what has no size of a map: statistics of norms, log-sum-exps of attention. And what two
    # down-samplers and the pooling beside them keep of the same map.
    assert kept <= found <= 1.08 * kept


def test_vgg_keeps_what_the_formula_says() -> None:
    state = {name: torch.zeros(shape) for name, shape in _vgg_shapes().items()}
    network, pixels = VGGPerceptual(state), torch.rand(1, 3, 32, 32, requires_grad=True)
    found = _saved_bytes(lambda: network(pixels, torch.rand(1, 3, 32, 32)), network)
    assert len(VGG_CHANNELS) == 5
    assert cost_vqvae.perceptual_kept(32) * 4 == pytest.approx(found, rel=0.35)


def test_dropout_adds_a_byte_for_each_number_that_it_may_drop() -> None:
    config = small_recipe("coglm.model.dropout=0.1").coglm.model
    without = small_recipe("coglm.model.dropout=0").coglm.model
    difference = plan.block_bytes(config, 10, 4) - plan.block_bytes(without, 10, 4)
    assert difference == 10 * 2 * config.hidden


def test_checkpointing_keeps_inputs_and_brings_one_layer_back() -> None:
    recipe = small_recipe("coglm.model.dropout=0", "coglm.model.layers=5")
    whole = plan.activations(recipe, cost.COGLM, FP32)
    saving = plan.activations(recipe, cost.COGLM, Setup(1, 0, 1, BATCH, 1, 1, "fp32", "fp32", "fp32"))
    tokens = BATCH * cost.coglm_sequence(recipe)
    block = plan.block_bytes(recipe.coglm.model, tokens, 4)
    assert saving.recomputed == block
    assert whole.kept - saving.kept == 5 * (block - 4 * tokens * recipe.coglm.model.hidden)


def test_chunks_of_logits_are_those_of_the_loss() -> None:
    assert plan.CHUNK_BYTES == chunked_cross_entropy.CHUNK_BYTES
    for positions in (0, 1, 7, 400, 6400):
        for budget in (1, 1000, 1 << 20):
            arguments = (positions, 600, budget)
            assert plan.chunk_rows(*arguments) == chunked_cross_entropy.chunk_rows(*arguments)


def test_pipe_stages_hold_as_many_micro_batches_as_lie_before_the_end() -> None:
    setup = Setup(4, 1, 4, 1, 8, 0)
    assert [plan.in_flight(setup, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert plan.in_flight(Setup(4, 1, 4, 1, 2, 0), 0) == 2
