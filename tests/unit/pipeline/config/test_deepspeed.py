"""DeepSpeed JSON files are checked against a typed list of keys, and never contradict the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from cogview2 import ds_configs
from cogview2.pipeline.config.deepspeed import accumulation_steps, read_json, resolve, weights_dtype
from cogview2.pipeline.config.deepspeed_schema import DeepSpeedJson
from cogview2.pipeline.config.problems import all_keys, dotted
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.errors import ConfigError

GOOD: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}


def train(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 10, "global_batch": 16, "deepspeed": "debug"} | values)


def write(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", ds_configs.names())
def test_every_shipped_json_is_valid_and_holds_no_knob_of_the_recipe(name: str) -> None:
    assert read_json(name).zero_optimization.stage in (0, 1, 2, 3)


def test_the_resolved_configuration() -> None:
    config = resolve(
        "debug", train(optimizer={"learning_rate": 3e-4, "betas": [0.9, 0.99], "gradient_clipping": 0.5}), 4
    )
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 16
    assert config["gradient_clipping"] == 0.5
    assert config["optimizer"] == {
        "type": "AdamW",
        "params": {
            "torch_adam": True,
            "adam_w_mode": True,
            "fused": True,
            "lr": 3e-4,
            "betas": [0.9, 0.99],
            "eps": 1e-8,
            "weight_decay": 0.01,
        },
    }
    assert config["pipeline"]["use_reentrant"] is False
    assert config["steps_per_print"] > 10**8
    json.dumps(config, allow_nan=False)


def test_an_auto_micro_batch_is_the_whole_share_of_a_rank() -> None:
    for ranks in (1, 2, 4):
        config = resolve("tiny_zero0", train(), ranks)
        assert config["train_micro_batch_size_per_gpu"] == 16 // ranks
        assert config["gradient_accumulation_steps"] == 1
    with pytest.raises(ConfigError, match="global batch of 15 or 18"):
        resolve("tiny_zero0", train(), 3)
    with pytest.raises(ConfigError, match="global batch of 32 or 64"):
        resolve("tiny_zero0", train(), 32)


def test_muon_is_refused_with_an_offloaded_optimizer_and_leaves_no_adamw_in_the_json(tmp_path: Path) -> None:
    muon = train(optimizer={"kind": "muon"})
    assert "optimizer" not in resolve("tiny_zero0", muon, 2)
    offloads = {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match="offload_optimizer does not go with"):
        resolve(write(tmp_path, GOOD | {"zero_optimization": offloads}), muon, 2)


def test_pipe_stages_leave_fewer_data_parallel_ranks() -> None:
    assert resolve("coglm_tiny_pp", train(pipeline_parallel=2), 4)["gradient_accumulation_steps"] == 2


def test_the_cpu_needs_no_compiled_optimizer(tmp_path: Path) -> None:
    assert resolve("coglm_zero3", train(global_batch=4096), 8)["optimizer"]["params"]["torch_adam"] is True
    own = write(tmp_path, GOOD | {"optimizer": {"params": {"torch_adam": False}}})
    for cpu in (False, True):
        params = resolve(own, train(), 8, cpu=cpu)["optimizer"]["params"]
        assert (params["torch_adam"], params.get("fused", False)) == (cpu, cpu)


@pytest.mark.parametrize("torch_adam", [True, False])
def test_an_offloaded_optimizer_of_torch_is_announced(tmp_path: Path, torch_adam: bool) -> None:
    zero = {"stage": 2, "offload_optimizer": {}}
    how = {"zero_optimization": zero, "optimizer": {"params": {"torch_adam": torch_adam}}}
    for cpu in (False, True):
        config = resolve(write(tmp_path, GOOD | how), train(), 2, cpu=cpu)
        assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
        own = torch_adam or cpu
        assert config.get("zero_force_ds_cpu_optimizer") is (False if own else None)
        assert config.get("zero_allow_untested_optimizer") is (True if own else None)
    assert "zero_force_ds_cpu_optimizer" not in resolve(write(tmp_path, GOOD), train(), 2, cpu=True)


@pytest.mark.parametrize(
    ("how", "plain", "interval"),
    [
        ({}, False, 0),
        ({"activation_checkpointing": {}}, True, 1),
        ({"activation_checkpointing": {}, "pipeline": {"activation_checkpoint_interval": 3}}, True, 3),
        ({"activation_checkpointing": {}, "pipeline": {"activation_checkpoint_interval": 0}}, True, 0),
        ({"pipeline": {"activation_checkpoint_interval": 2}}, False, 2),
    ],
)
def test_one_section_turns_recomputation_on(
    tmp_path: Path, how: dict[str, Any], plain: bool, interval: int
) -> None:
    config = resolve(write(tmp_path, GOOD | how), train(), 2)
    assert ("activation_checkpointing" in config) == plain
    assert config["pipeline"]["activation_checkpoint_interval"] == interval
    assert config["pipeline"]["use_reentrant"] is False


def test_gradients_that_are_summed_in_fp32_also_travel_so(tmp_path: Path) -> None:
    how = {"bf16": {}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert "communication_data_type" not in resolve(write(tmp_path, GOOD | {"bf16": {}}), train(), 2)
    assert resolve(write(tmp_path, GOOD | how), train(), 2)["communication_data_type"] == "fp32"
    how["communication_data_type"] = "bf16"  # type: ignore[assignment]
    assert resolve(write(tmp_path, GOOD | how), train(), 2)["communication_data_type"] == "bf16"


def test_the_type_of_the_weights(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "float32"),
        ({"bf16": {}}, "bfloat16"),
        ({"bf16": {"enabled": False}}, "float32"),
        ({"fp16": {}}, "float16"),
        ({"torch_autocast": {}}, "float32"),
    ]
    for how, expected in cases:
        assert weights_dtype(resolve(write(tmp_path, GOOD | how), train(), 2)) == expected


@pytest.mark.parametrize(("zero", "pipe"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2)])
def test_every_other_pair_is_allowed(tmp_path: Path, zero: int, pipe: int) -> None:
    config = resolve(
        write(tmp_path, GOOD | {"zero_optimization": {"stage": zero}}), train(pipeline_parallel=pipe), 4
    )
    assert config["gradient_accumulation_steps"] == 2 * pipe


@pytest.mark.parametrize(
    ("global_batch", "micro", "data_parallel", "expected"), [(16, 2, 4, 2), (16, 16, 1, 1), (4096, 4, 2, 512)]
)
def test_accumulation(global_batch: int, micro: int, data_parallel: int, expected: int) -> None:
    assert accumulation_steps(train(global_batch=global_batch), micro, data_parallel) == expected


@pytest.mark.parametrize(
    ("global_batch", "micro", "data_parallel", "parts"),
    [
        (18, 4, 2, ["18", "micro batch 4 x 2", "= 8", "16 or 24", "a micro batch of 3"]),
        (3, 4, 2, ["3", "= 8", "global batch of 8"]),
        (12, 4, 2, ["8 or 16", "micro batch of 3"]),
    ],
)
def test_a_remainder_is_refused_with_what_fits(
    global_batch: int, micro: int, data_parallel: int, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(train(global_batch=global_batch), micro, data_parallel)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "values", "world", "parts"),
    [
        ({"train_batch_size": 16}, {}, 2, ["'train_batch_size' = 16", "recipe", "train.global_batch"]),
        ({"gradient_accumulation_steps": 2}, {}, 2, ["gradient_accumulation_steps", "train.global_batch"]),
        ({"gradient_clipping": 1.0}, {}, 2, ["gradient_clipping", "train.optimizer.gradient_clipping"]),
        (
            {"optimizer": {"params": {"lr": 1}}},
            {},
            2,
            ["optimizer.params.lr = 1", "train.optimizer.learning_rate"],
        ),
        (
            {"zero_optimization": {"stage": 2}},
            {"pipeline_parallel": 2},
            2,
            ["stage 2", "pipeline_parallel 2", "use stage 1"],
        ),
        ({"zero_optimization": {"stage": 3}}, {"pipeline_parallel": 2}, 2, ["stage 3", "use stage 1"]),
        ({"zero_optimization": {"stage": 0}, "bf16": {}}, {}, 2, ["bf16", "stage 0", "use stage 1"]),
        ({"zero_optimization": {"stage": 0}, "fp16": {}}, {}, 2, ["fp16", "stage 0", "use stage 1"]),
        ({"bf16": {}, "fp16": {}}, {}, 2, ["more than one", "keep one"]),
        ({"bf16": {}, "torch_autocast": {}}, {}, 2, ["more than one", "keep one"]),
        ({"torch_autocast": {"dtype": "float16"}}, {}, 2, ["dtype float16", "use fp16, or dtype bfloat16"]),
        ({"torch_autocast": {}}, {"pipeline_parallel": 2}, 2, ["torch_autocast", "use bf16"]),
        (
            {"bf16": {}, "data_types": {"grad_accum_dtype": "fp16"}},
            {},
            2,
            ["grad_accum_dtype fp16", "weights in bf16", "use fp32 or bf16"],
        ),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, 2, ["grad_accum_dtype bf16", "weights in fp32"]),
        (
            {"bf16": {}, "communication_data_type": "fp16"},
            {},
            2,
            ["communication_data_type fp16", "use fp32 or bf16"],
        ),
        (
            {"fp16": {}, "data_types": {"grad_accum_dtype": "fp32"}},
            {"pipeline_parallel": 2},
            2,
            ["grad_accum_dtype fp32 with fp16", "tied word embeddings", "delete data_types"],
        ),
        (
            {
                "bf16": {},
                "data_types": {"grad_accum_dtype": "fp32"},
                "zero_optimization": {"stage": 1, "offload_optimizer": {}},
            },
            {"pipeline_parallel": 2},
            2,
            ["grad_accum_dtype fp32 with offload_optimizer", "tied word embeddings", "delete data_types"],
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
            {"pipeline_parallel": 2},
            2,
            ["overlap_comm", "pipeline_parallel 2", "delete it"],
        ),
        (
            {"pipeline": {"partition": [3, 1]}},
            {"pipeline_parallel": 4},
            4,
            ["2 counts", "pipeline_parallel 4", "give 4"],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {}}},
            {},
            2,
            ["offload_optimizer", "stage 0", "use stage 1, 2 or 3"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            {},
            2,
            ["offload_optimizer.device is 'nvme'", "'cpu'"],
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            {},
            2,
            ["unknown key", "activation_checkpointing.cpu_checkpointing"],
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            {},
            2,
            ["offload_param", "stage 3"],
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            {},
            2,
            ["round_robin_gradients", "delete it"],
        ),
        (
            {"zero_optimization": {"stage": 4}},
            {},
            2,
            ["zero_optimization.stage is 4", "less than or equal to 3"],
        ),
        ({}, {"pipeline_parallel": 3}, 4, ["pipeline_parallel 3", "4 ranks", "multiple of 3"]),
        ({"optimiser": {}}, {}, 2, ["unknown key 'optimiser'", "did you mean 'optimizer'?"]),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            {},
            2,
            ["did you mean 'zero_optimization.overlap_comm'"],
        ),
        ({"optimizer": {"type": "Adam"}}, {}, 2, ["optimizer.type is 'Adam'", "'AdamW'"]),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, change: dict[str, Any], values: dict[str, Any], world: int, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(write(tmp_path, GOOD | change), train(**values), world)
    for part in parts:
        assert part in str(caught.value)


def test_fp16_is_refused_on_cpus_alone(tmp_path: Path) -> None:
    own = write(tmp_path, GOOD | {"fp16": {}})
    assert resolve(own, train(), 2)["fp16"]["enabled"] is True
    with pytest.raises(ConfigError, match="fp16 does not train on CPUs; use bf16"):
        resolve(own, train(), 2, cpu=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', "stands twice"),
        ("{", "not valid JSON"),
        ("[]", "holds no keys"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "key 'train_micro_batch_size_per_gpu' is missing"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_json(write(tmp_path, text))


def test_an_unknown_name_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no DeepSpeed configuration 'debgu'; there are: .*debug"):
        read_json("debgu")
    with pytest.raises(ConfigError, match="cannot read"):
        read_json(str(tmp_path / "none.json"))


@pytest.mark.parametrize("path", list(all_keys(DeepSpeedJson)), ids=dotted)
def test_a_letter_left_out_of_any_key_is_refused(tmp_path: Path, path: tuple[str, ...]) -> None:
    content: dict[str, Any] = json.loads(json.dumps(GOOD))
    section = content
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1][1:]] = 1
    with pytest.raises(ConfigError, match="unknown key .*did you mean"):
        read_json(write(tmp_path, content))
