"""`cogview2 plan`: what it says, refuses and recommends; formulas against sums written out here."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_networks import small_recipe

from cogview2.launch import cli
from cogview2.launch.plan import inventory, scaling, storage
from cogview2.launch.plan.activations import activations
from cogview2.launch.plan.memory import KINDS, memory_of, worst_memory
from cogview2.launch.plan.results import hosts_of, plan
from cogview2.launch.plan.sampling import sampling
from cogview2.launch.plan.setup import Setup, setup_of
from cogview2.launch.plan.states import aligned, states, touching
from cogview2.launch.plan.timing import Assumptions, bus_bandwidth, step_time
from cogview2.launch.plan.topologies import SLACK, candidates, recommend, setups
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.hardware import find_hardware
from cogview2.pipeline.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[3]
ASSUMED = Assumptions()
PUBLISHED = load_recipe("cogview2_6b", [])
SIZE = 5_902_307_328
BASE = Setup(8, 1, 1, 8, 64, 1, accumulate="fp32", communicate="fp32")


def _plan(ranks: int, hardware: str, *overrides: str, stage: str = "pretrain_coglm") -> dict[str, Any]:
    recipe = load_recipe("cogview2_6b", list(overrides))
    device = find_hardware(hardware)
    return plan(recipe, hosts_of(ranks, device), hardware, device, ASSUMED, stages=(stage,))


def test_it_answers_within_two_seconds_and_without_torch() -> None:
    script = (
        "import sys, time\n"
        "from cogview2.launch.cli import main\n"
        "code = main(['plan', 'cogview2_6b'])\n"
        "heavy = [name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules]\n"
        "print(repr((int(code), heavy, time.process_time())), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    code, heavy, seconds = eval(done.stderr.splitlines()[-1])
    assert (code, heavy) == (0, [])
    assert seconds < 2
    for unit in cost.UNITS:
        assert f"{unit}: " in done.stdout
    assert "39.08 GB" in done.stdout  # float16 weights of the three transformers
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


@pytest.mark.parametrize(("ranks", "expected"), [(8, 32.5), (256, 23.9)])
def test_states_of_zero_1_with_16_bit_sums(ranks: int, expected: float) -> None:
    """4 B x 5.9 G + 12 B x 5.9 G / ranks, before buffers."""
    setup = replace(BASE, ranks=ranks, accumulate="bf16", communicate="bf16")
    held = states(inventory.inventory(PUBLISHED, cost.COGLM, setup), setup)
    found = held.weights + held.summing + held.master + held.optimizer
    assert found == pytest.approx(4 * SIZE + 12 * SIZE / ranks, rel=1e-6)
    assert round(found / 1e9, 1) == expected


def test_bf16_that_is_summed_in_fp32_takes_six_bytes_more_for_each_weight() -> None:
    kept = inventory.inventory(PUBLISHED, cost.COGLM, BASE)
    held = states(kept, BASE)
    assert held.weights + held.summing == pytest.approx(8 * SIZE, rel=1e-6)


def test_shares_and_what_touches_them() -> None:
    assert [aligned(n, 3) for n in (1, 6, 7)] == [6, 6, 12]
    sizes = (5, 9, 1, 3)  # 18 numbers: shares of 6 for three ranks
    assert [touching(sizes, 3, rank) for rank in range(3)] == [5 + 9, 9, 9 + 1 + 3]


def test_kinds_add_up_to_the_peak() -> None:
    for zero in (1, 2, 3):
        found = worst_memory(PUBLISHED, cost.COGLM, replace(BASE, zero=zero))
        assert set(found.kinds) == set(KINDS)
        assert sum(found.kinds.values()) == found.peak


def test_a_pipeline_holds_its_layers_once_but_for_the_tied_words() -> None:
    setup = replace(BASE, pipe_stages=4, ranks=8)
    parts = [inventory.inventory(PUBLISHED, cost.COGLM, setup, stage) for stage in range(4)]
    table = 150_010 * 3072
    assert sum(part.total for part in parts) == SIZE + table
    assert [part.table for part in parts] == [table, 0, 0, table]


@pytest.mark.parametrize(
    ("ranks", "hardware"), [(8, "a100_80"), (8, "h100_80"), (64, "a100_80"), (256, "a100_40")]
)
def test_pipe_stages_are_only_recommended_for_their_step_time(ranks: int, hardware: str) -> None:
    (unit,) = _plan(ranks, hardware)["units"]
    best, ways = unit["recommended"], [way for way in unit["compared"] if way["fits"]]
    assert best is not None and best["fits"]
    fastest = min(way["step"]["total"] for way in ways)
    assert best["step"]["total"] <= SLACK * fastest
    if best["pipe_stages"] > 1:
        plain = [way["step"]["total"] for way in ways if way["pipe_stages"] == 1]
        assert not plain or best["step"]["total"] < min(plain)
        assert any("pp 1" in reason for reason in unit["why"])
    else:
        assert any(reason.startswith("pp ") for reason in unit["why"])


def test_zero_1_without_pipeline_fits_eight_times_80_gb_but_not_256_times_40_when_it_sums_in_fp32() -> None:
    def smallest(ranks: int, hardware: str) -> dict[str, Any]:
        (unit,) = _plan(ranks, hardware)["units"]
        return next(way for way in unit["compared"] if (way["zero"], way["pipe_stages"]) == (1, 1))

    assert smallest(8, "a100_80")["fits"]
    assert not smallest(256, "a100_40")["fits"]
    sixteen = replace(BASE, ranks=256, micro_batch=1, accumulation=16, accumulate="bf16", communicate="bf16")
    assert worst_memory(PUBLISHED, cost.COGLM, sixteen).peak < 36e9


def test_when_nothing_with_one_pipe_stage_fits_more_are_taken_and_it_says_so() -> None:
    """Sizes where only pipe stages divide the activations: no other way is allowed to fit."""
    found = candidates(PUBLISHED, cost.COGLM, replace(BASE, ranks=8), find_hardware("a100_80"), ASSUMED)
    piped = [one for one in found if one.setup.pipe_stages > 1]
    limit = min(one.memory.peak for one in piped)
    only = [replace(one, budget=limit) for one in found if one.setup.zero == 1]
    best = recommend(only)
    assert best is not None and best.setup.pipe_stages > 1


def test_every_way_that_is_compared_is_one_that_run_accepts(tmp_path: Path) -> None:
    base = json.loads((ROOT / "ds_configs" / "coglm_6b_pp.json").read_text())
    resolved = resolve("coglm_6b_pp", PUBLISHED.coglm.train, 8)
    own = setup_of(resolved, PUBLISHED.coglm.train, 8)
    ways = list(setups(PUBLISHED, cost.COGLM, own)) + list(setups(PUBLISHED, cost.COGLM, own, offload=True))
    assert len(ways) > 90
    seen = set()
    for way in ways:
        key = (way.zero, way.pipe_stages, way.offload_optimizer, way.checkpointing)
        if key in seen:
            continue
        seen.add(key)
        content = base | {
            "zero_optimization": {"stage": way.zero},
            "train_micro_batch_size_per_gpu": way.micro_batch,
        }
        if way.offload_optimizer:
            content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if not way.checkpointing:
            content.pop("activation_checkpointing", None)
        path = tmp_path / "way.json"
        path.write_text(json.dumps(content))
        train = PUBLISHED.coglm.train.model_copy(
            update={"deepspeed": str(path), "pipeline_parallel": way.pipe_stages}
        )
        again = setup_of(resolve(str(path), train, 8), train, 8)
        assert again == replace(way, partition=again.partition)


def test_time_is_made_of_its_parts() -> None:
    hardware = find_hardware("h100_80")
    for setup in (BASE, replace(BASE, zero=3, overlap=True), replace(BASE, pipe_stages=4, accumulation=256)):
        found = step_time(PUBLISHED, cost.COGLM, setup, hardware, ASSUMED)
        parts = (found.compute, found.bubble, found.reduce, found.gather, found.pipe, found.update)
        assert found.total == pytest.approx(sum(parts))
        flops = cost.train_flops_per_sample(PUBLISHED, cost.COGLM) * 4096
        assert found.mfu == pytest.approx(flops / found.total / (8 * 989e12))


def test_bubble_and_volumes_follow_their_formulas() -> None:
    hardware, ranks = find_hardware("a100_80"), 8
    piped = step_time(
        PUBLISHED, cost.COGLM, replace(BASE, pipe_stages=4, accumulation=256), hardware, ASSUMED
    )
    assert piped.bubble_share == 3 / (256 + 3)
    assert piped.bubble == pytest.approx(piped.compute * 3 / 256)
    message = 2 * 8 * 512 * 3072
    assert piped.volume["pipe"] == 2 * message * (256 + 3) + 4 * 150_010 * 3072
    share = (ranks - 1) / ranks
    zero1 = step_time(PUBLISHED, cost.COGLM, BASE, hardware, ASSUMED).volume
    zero2 = step_time(PUBLISHED, cost.COGLM, replace(BASE, zero=2), hardware, ASSUMED).volume
    zero3 = step_time(PUBLISHED, cost.COGLM, replace(BASE, zero=3), hardware, ASSUMED).volume
    assert zero1 == {"reduce": 2 * share * 4 * SIZE, "gather": share * 2 * SIZE, "pipe": 0}
    assert zero2["reduce"] == 64 * zero1["reduce"]
    assert zero3 == {"reduce": share * 4 * SIZE * 64, "gather": 2 * share * 2 * SIZE * 64, "pipe": 0}


def test_rings_between_hosts_are_as_fast_as_the_slower_link() -> None:
    hardware = find_hardware("l40s")
    assert bus_bandwidth(8, hardware) == 32e9
    assert bus_bandwidth(16, hardware) == 32e9
    assert bus_bandwidth(16, find_hardware("a100_80")) == 200e9


def test_more_ranks_take_less_time_and_a_slower_network_more() -> None:
    times = [_plan(ranks, "a100_80")["units"][0]["recommended"]["step"]["total"] for ranks in (8, 64, 256)]
    assert times == sorted(times, reverse=True)
    fast = find_hardware("a100_80")
    slow = fast.model_copy(update={"network_gb_s": 10.0})
    setup = replace(BASE, ranks=64, accumulation=8)
    both = [step_time(PUBLISHED, cost.COGLM, setup, one, ASSUMED).total for one in (fast, slow)]
    assert both[0] < both[1]


def test_checkpoints_are_weights_and_twelve_bytes_of_states() -> None:
    size = storage.checkpoint_bytes(PUBLISHED, cost.COGLM, BASE)
    assert size == pytest.approx(14 * SIZE, rel=1e-6)
    piped = storage.checkpoint_bytes(PUBLISHED, cost.COGLM, replace(BASE, pipe_stages=4))
    assert piped - size == pytest.approx(14 * 150_010 * 3072, rel=1e-4)  # the tied words on both ends
    frozen = storage.checkpoint_bytes(PUBLISHED, cost.DIRECT, BASE)
    assert frozen == pytest.approx(2 * 7_725_895_680 + 12 * 1_823_588_352, rel=1e-6)
    found = storage.checkpoint(PUBLISHED, cost.COGLM, BASE, ASSUMED)
    assert (found.disk, found.exported) == (4 * found.size, 4 * SIZE)  # three kept, one being written


def test_shards_of_a_data_set() -> None:
    found = storage.data(load_recipe("cogview2_6b", ["shards.samples_per_shard=1000"]), 2500)
    assert (found.shards, found.size) == (3, 2500 * found.sample_bytes)
    assert len(found.problems) == 1 and "pretrain_coglm: a global batch of 4096" in found.problems[0]
    drawings = load_recipe("quickstart", [])
    assert storage.data(drawings, None).pictures == drawings.data.drawings.count


def test_a_sample_in_a_shard_is_as_large_as_the_plan_says(tmp_path: Path) -> None:
    import numpy as np

    from cogview2.pipeline.data.records import TokenPair
    from cogview2.pipeline.data.shard_writer import write_shard

    def pair(number: int) -> TokenPair:
        ids = {language: np.zeros(24, np.int32) for language in ("en", "zh")}
        base, fine = np.zeros(400, np.int32), np.zeros(3600, np.int32)
        captions = {"en": "a red square on a green ground " * 4, "zh": "a" * 100}
        return TokenPair(f"{number:08d}", ids, base, fine, captions, {"source": "test"})

    write_shard(tmp_path, "shard-000000", [pair(k) for k in range(50)])
    written = sum(path.stat().st_size for path in tmp_path.iterdir()) / 50
    assert storage.sample_bytes(PUBLISHED) == pytest.approx(written, rel=0.05)


def test_sampling_says_when_models_must_take_turns() -> None:
    together = sampling(PUBLISHED, find_hardware("a100_80"), ASSUMED)
    in_turn = sampling(PUBLISHED, find_hardware("a100_40"), ASSUMED)
    assert sum(together.weights[name] for name in ("coglm", "direct", "iterative")) == 39_083_139_072
    assert together.cache == 16 * 2 * 48 * 512 * 3072 * 2
    assert (together.fits, in_turn.fits) == ("together", "in turn")
    assert in_turn.peak_in_turn < 40e9 < in_turn.peak_together
    small = find_hardware("a100_40").model_copy(update={"memory_gb": 16.0})
    assert sampling(PUBLISHED, small, ASSUMED).fits == "no"


def test_the_recipes_own_way_is_checked_as_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    piped = ["coglm.train.deepspeed=coglm_6b_pp", "coglm.train.pipeline_parallel=4"]
    override = [word for change in piped for word in ("--set", change)]
    assert cli.main(["plan", "cogview2_6b", "--ranks", "6", "--stages", "pretrain_coglm", *override]) == 78
    shown = capsys.readouterr()
    assert "pipeline_parallel 4 does not divide the 6 ranks" in shown.err
    assert shown.err.startswith("cogview2: pretrain_coglm: ")
    with pytest.raises(Exception, match="does not divide the 6 ranks"):
        resolve("coglm_6b_pp", load_recipe("cogview2_6b", piped).coglm.train, 6)


def test_what_cannot_fit_is_refused_with_the_kind_and_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "cogview2_6b", "--ranks", "8", "--hardware", "a100_40", "--stages", "pretrain_coglm"]
    override = ["--set", "coglm.train.deepspeed=coglm_6b_zero1", "--set", "coglm.train.pipeline_parallel=1"]
    assert cli.main([*arguments, *override]) == 78
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "GB of it gradients" in message and "a100_40 has 36 GB to give; use ZeRO" in message
    alone = ["plan", "cogview2_6b", "--ranks", "1", "--hardware", "a100_40", "--stages", "pretrain_coglm"]
    assert cli.main([*alone, "--set", "coglm.model.layers=1000"]) == 78
    assert "use more ranks or larger devices" in capsys.readouterr().err


def test_a_global_batch_without_a_share_for_every_rank_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "cogview2_6b", "--ranks", "48", "--stages", "pretrain_coglm"]) == 78
    assert "global_batch 4096 is not a multiple of micro batch 4 x 48" in capsys.readouterr().err
    assert cli.main(["plan", "cogview2_6b", "--ranks", "3", "--stages", "train_vqvae"]) == 78
    assert "a global batch of 64 has no equal share for 3 ranks" in capsys.readouterr().err


def test_small_stages_are_planned_on_the_part_of_the_hosts_that_they_use(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "cogview2_6b", "--ranks", "512"]) == 0
    out = capsys.readouterr().out
    assert "on 8 ranks, 504 stay idle: its global batch has no equal share for more hosts" in out
    assert cli.main(["plan", "cogview2_6b", "--ranks", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [unit["ranks"] for unit in found["units"]] == [8, 512, 256, 256]
    best = [unit["recommended"] for unit in found["units"]]
    assert found["cascade"]["recommended"]["gpu_hours"] == pytest.approx(
        sum(one["gpu_hours"] for one in best) + found["evaluate"]["gpu_hours"]
    )
    assert best[0]["gpu_hours"] == pytest.approx(8 * best[0]["hours"])


def test_json_has_what_the_table_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "cogview2_6b", "--json", "--pictures", "30000000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [unit["unit"] for unit in found["units"]] == list(cost.UNITS)
    assert found["data"]["shards"] == 3000 and found["refusals"] == []
    coglm = found["units"][1]
    assert coglm["tokens"] == 432_000 * 4096 * 512
    assert coglm["recommended"]["gpu_hours"] == pytest.approx(8 * coglm["recommended"]["hours"])
    hours = sum(unit["recommended"]["hours"] for unit in found["units"]) + found["evaluate"]["hours"]
    assert found["cascade"]["recommended"]["hours"] == pytest.approx(hours)


def test_hosts_of_a_file_decide_ranks_and_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=4\ntwo slots=4\n")
    assert (
        cli.main(["plan", "cogview2_6b", "--hosts", str(hosts), "--json", "--stages", "pretrain_coglm"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["hosts"], found["hardware"]["per_host"]) == (8, 2, 4)


def test_the_hardware_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--list-hardware"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:]} >= {"a100_40", "a100_80", "h100_80", "h200_141", "v100_32"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a recipe"),
        (["cogview2_6b", "--hardware", "abacus"], "hardware abacus is not in the table; use one of v100_32"),
        (["cogview2_6b", "--ranks", "0"], "--ranks 0: a plan needs at least 1 rank"),
        (["cogview2_6b", "--pictures", "0"], "--pictures 0: must be at least 1"),
        (["cogview2_6b", "--hardware", "v100_32"], "has no bf16 matrix products; use one of fp16, fp32"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 78
    assert message in capsys.readouterr().err


def test_the_default_hardware_is_the_recipes() -> None:
    recipe = small_recipe("launch.hardware=h200_141")
    assert recipe.launch.hardware == "h200_141"


def test_muon_keeps_one_average_for_matrices() -> None:
    recipe = load_recipe("quickstart", [])
    setup = Setup(2, 0, 1, 8, 1, 0, "fp32", "fp32", "fp32")
    kept = inventory.inventory(recipe, cost.VQVAE, setup)
    plain, muon = (states(kept, replace(setup, muon=flag)).optimizer for flag in (False, True))
    assert plain - muon == 4 * sum(kept.matrices)


def test_offload_moves_states_to_the_host() -> None:
    kept = inventory.inventory(PUBLISHED, cost.COGLM, BASE)
    setup = replace(BASE, zero=2, accumulate="bf16", communicate="bf16")
    here, there = states(kept, setup), states(kept, replace(setup, offload_optimizer=True))
    assert there.master == there.optimizer == here.host == 0
    assert there.host >= 12 * SIZE / 8
    used = activations(PUBLISHED, cost.COGLM, setup)
    assert memory_of(there, used, setup).peak < memory_of(here, used, setup).peak


def test_tables_of_the_page_are_those_of_the_plans() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name, table in scaling.tables().items():
        assert table in page, f"table {name}: python -m cogview2.launch.plan.scaling prints it"
    for ranks, hardware in scaling.CLUSTERS:
        assert scaling.command(ranks, hardware) in page
    assert math.isclose(scaling.figures(8, "a100_80")["units"][0]["flops_per_sample"], 18.08e12, rel_tol=1e-3)
    assert "18.08" in page
