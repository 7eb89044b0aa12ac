"""What training does differently on a GPU: FlexAttention in place of SDPA, the chunked loss, float16 with loss scaling."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pydantic", reason="needs pydantic, for the sizes of models")

from cogview2.pipeline.config.model import CogLMConfig  # noqa: E402
from cogview2.pipeline.models.coglm import chunked_cross_entropy  # noqa: E402
from cogview2.pipeline.models.coglm.chunked_cross_entropy import weighted_cross_entropy  # noqa: E402
from cogview2.pipeline.models.coglm.masks import (  # noqa: E402
    CONTEXT,
    HIDDEN,
    IMAGE,
    attention_mask,
    segment_role,
)
from cogview2.pipeline.models.coglm.model import CogLM  # noqa: E402
from cogview2.pipeline.models.coglm.visibility import Visibility, visibility_of  # noqa: E402
from cogview2.pipeline.models.transformer.attention import SelfAttention, attend, score_bias  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
TEXT, CODES = 112, 400


def published_roles() -> torch.Tensor:
    """Four rows of 112 text slots and 400 codes: generation, captioning with patches, text, and one that is blind."""
    torch.manual_seed(0)
    generation = [CONTEXT] * 60 + [HIDDEN] * 51 + [IMAGE] * (CODES + 1)
    first, second = segment_role(2, reads_image=True), segment_role(3, reads_image=True)
    captions = [first] * 30 + [second] * 40 + [HIDDEN] * (TEXT - 70)
    captions += [IMAGE if cell % 5 < 3 else CONTEXT for cell in range(CODES)]
    text = [IMAGE if token % 11 in (4, 5, 6) else CONTEXT for token in range(TEXT + CODES)]
    blind = [HIDDEN] * 200 + [segment_role(2)] * (TEXT + CODES - 200)
    return torch.tensor([generation, captions, text, blind], device=DEVICE)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of `exact`."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_flex_equals_sdpa_at_the_published_shape() -> None:
    roles = published_roles()
    visible = attention_mask(roles)
    sees = visible.any(-1, keepdim=True)
    assert not sees.all()
    q, k, v, up = (
        torch.randn(4, 48, TEXT + CODES, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)
    )

    def run(attention: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        out = attention(*leaves) * sees
        return [out.detach(), *torch.autograd.grad(out, leaves, up.to(dtype))]

    made = Visibility(roles)
    exact = run(lambda *qkv: attend(*qkv, score_bias(visible, torch.float32), 0.0), torch.float32)
    sdpa = run(lambda *qkv: attend(*qkv, made.bias(torch.bfloat16), 0.0), torch.bfloat16)
    flex = run(lambda *qkv: attend(*qkv, made.block_mask(), 0.0), torch.bfloat16)
    for name, mine, peer, right in zip(("out", "dq", "dk", "dv"), flex, sdpa, exact, strict=True):
        assert mine.isfinite().all(), name
        assert relative(mine, right) < max(1.5 * relative(peer, right), 0.01), name


def test_blind_queries_get_zeros_and_finite_gradients() -> None:
    roles = published_roles()
    q, k, v = (
        torch.randn(4, 2, TEXT + CODES, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    out = attend(q, k, v, Visibility(roles).block_mask(), 0.0)
    blind = ~attention_mask(roles).any(-1).squeeze(1)
    assert not out.transpose(1, 2)[blind].any()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
        assert gradient.isfinite().all()


def _small(**changes: float) -> CogLMConfig:
    sizes = {"layers": 3, "hidden": 128, "heads": 2, "max_positions": 1024, "dropout": 0.0} | changes
    return CogLMConfig.model_validate(sizes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_trains_alike_with_both(checkpointing: bool) -> None:
    roles = published_roles()[:3]
    tokens = torch.randint(0, 500, roles.shape, device=DEVICE)
    positions = torch.arange(roles.shape[1], device=DEVICE).expand_as(roles)
    results = []
    for backend in ("sdpa", "flex"):
        torch.manual_seed(0)
        model = CogLM(_small(), 500).to(DEVICE)
        model.transformer.activation_checkpointing = checkpointing
        hidden = model(tokens, positions, Visibility(roles, backend))  # type: ignore[arg-type]
        weighted_cross_entropy(
            hidden.flatten(0, 1),
            model.transformer.word_embeddings.weight,
            tokens.flatten(),
            torch.ones(tokens.numel(), device=DEVICE),
        )[0].backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for sdpa, flex in zip(*results, strict=True):
        assert relative(flex, sdpa) < 2e-3


def test_flex_is_chosen_and_compiled_once_for_many_micro_batches() -> None:
    attention = SelfAttention(_small()).to(DEVICE, torch.bfloat16)
    x = torch.randn(4, TEXT + CODES, 128, device=DEVICE, dtype=torch.bfloat16)
    torch._dynamo.utils.counters.clear()
    for shift in range(4):
        roles = published_roles().roll(shift, 0)
        mask = visibility_of(roles).mask_for(attention, x.dtype)
        assert not isinstance(mask, torch.Tensor)
        attention(x, mask).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
    with_dropout = SelfAttention(_small(dropout=0.1)).to(DEVICE)
    assert isinstance(Visibility(published_roles()).mask_for(with_dropout, x.dtype), torch.Tensor)


def _naive(
    hidden: torch.Tensor, words: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    losses = F.cross_entropy(F.linear(hidden, words).float(), labels, reduction="none")
    return (losses * weights).sum()


def _peak(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_chunked_loss_equals_the_naive_one_and_takes_a_quarter_of_its_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    positions, vocabulary, width = 4800, 150_010, 1024
    hidden = torch.randn(positions, width, device=DEVICE, dtype=dtype, requires_grad=True)
    words = (torch.randn(vocabulary, width, device=DEVICE) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (positions,), device=DEVICE)
    weights = torch.rand(positions, device=DEVICE) + 0.5
    scale = 1 / float(weights.sum())

    def ours() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(weighted_cross_entropy(hidden, words, labels, weights)[0], (hidden, words))

    def plain() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(_naive(hidden, words, labels, weights), (hidden, words))

    total, losses = weighted_cross_entropy(hidden, words, labels, weights)
    assert losses.dtype == torch.float32
    expected = _naive(hidden, words, labels, weights)
    assert float(total.detach() * scale) == pytest.approx(float(expected.detach() * scale), rel=1e-3)
    with torch.no_grad():
        exact = F.softmax(hidden[:64].float() @ words.float().T, 1)
        exact[torch.arange(64), labels[:64]] -= 1
        exact_hidden = (exact * weights[:64, None]) @ words.float()
    found = ours()
    assert relative(found[0][:64], exact_hidden) < (1e-4 if dtype == torch.float32 else 0.01)
    assert relative(found[1], plain()[1]) < (1e-4 if dtype == torch.float32 else 0.02)
    del found, exact, exact_hidden, total, expected
    torch.cuda.empty_cache()
    assert _peak(ours) <= _peak(plain) / 4


def test_products_of_half_precision_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the device's own mixed products."""
    assert chunked_cross_entropy._has_mixed_products(torch.device("cuda", torch.cuda.current_device()))
    torch.manual_seed(0)
    hidden = torch.randn(256, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    words = torch.randn(900, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels, weights = torch.randint(0, 900, (256,), device=DEVICE), torch.rand(256, device=DEVICE)
    results = []
    for mixed in (True, False):
        monkeypatch.setattr(chunked_cross_entropy, "_has_mixed_products", lambda _, mixed=mixed: mixed)
        total, _ = weighted_cross_entropy(hidden, words, labels, weights, chunk_bytes=16 * 900 * 6)
        results.append(torch.autograd.grad(total, (hidden, words)))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, words)]
    losses = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")
    right = torch.autograd.grad((losses * weights).sum(), exact)
    for found in results:
        assert all(relative(mine, true) < 0.01 for mine, true in zip(found, right, strict=True))


def test_float16_training_recovers_from_a_loss_scale_that_is_too_high(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scale of 2^30 overflows: those updates are skipped, the scale is halved, and then the loss falls."""
    deepspeed = pytest.importorskip("deepspeed", reason="needs deepspeed")
    import socket

    from cogview2.pipeline.config.training import OptimizerConfig
    from cogview2.pipeline.distributed.process import World
    from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
    from cogview2.pipeline.training.engine import PlainEngine
    from cogview2.pipeline.training.train_modules.coglm import CogLMTrainModule

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (rank | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    deepspeed.init_distributed("nccl")
    vocabulary = Vocabulary.uniform(64, 100)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}},
        "fp16": {"enabled": True, "initial_scale_power": 30, "hysteresis": 1, "min_loss_scale": 1},
    }
    optimizer = OptimizerConfig(learning_rate=1e-3)
    world = World(0, 1, 0, torch.device("cuda", 0))
    torch.manual_seed(0)
    engine = PlainEngine(CogLMTrainModule(_small(), vocabulary), config, optimizer, world)
    roles = published_roles().cpu()
    tokens = torch.randint(0, vocabulary.rows, roles.shape)
    batch = {
        "tokens": tokens,
        "position_ids": torch.arange(roles.shape[1]).expand_as(roles),
        "roles": roles,
        "labels": tokens.roll(-1, 1),
        "loss_mask": roles >> 2 > 0,
        "loss_weights": torch.rand(roles.shape) + 0.5,
    }
    outputs = [engine.train_step(step, [batch], 1e-3) for step in range(40)]
    scales = [output.extra["loss_scale"] for output in outputs]
    assert scales[-1] < 2.0**30 and outputs[-1].extra["skipped_steps"] >= 1
    assert outputs[-1].loss < 0.8 * outputs[0].loss
    norm = engine.grad_norm()
    assert norm is not None and 0 < norm < 1e4
    torch.distributed.destroy_process_group()
