"""On how many hosts a stage runs, and with which configuration."""

import pytest

from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.units import hosts_used, resolve_stage
from cogview2.pipeline.errors import ConfigError

PUBLISHED = load_recipe("cogview2_6b", [])


def test_small_stages_of_a_large_cluster_use_a_part_of_its_hosts() -> None:
    cluster = [8] * 64
    assert hosts_used(PUBLISHED, "train_vqvae", cluster) == 1  # 64 pictures in micro batches of 8
    assert hosts_used(PUBLISHED, "finetune_superres", cluster) == 32  # 256 samples in micro batches of 1
    assert hosts_used(PUBLISHED, "pretrain_coglm", cluster) == 64
    for stage in ("train_tokenizer", "shard_dataset", "evaluate"):
        assert hosts_used(PUBLISHED, stage, cluster) == 64
        assert resolve_stage(PUBLISHED, stage, cluster) == {}
    found = resolve_stage(PUBLISHED, "finetune_superres", cluster)
    assert set(found) == {"finetune_superres/direct", "finetune_superres/iterative"}
    assert all(config["train_batch_size"] == 256 for config in found.values())
    assert all(config["gradient_accumulation_steps"] == 1 for config in found.values())


def test_the_most_hosts_with_an_equal_share_from_the_first_on() -> None:
    assert hosts_used(PUBLISHED, "finetune_superres", [8] * 6) == 4
    assert hosts_used(PUBLISHED, "finetune_superres", [4, 4, 6, 2, 3]) == 4
    assert hosts_used(PUBLISHED, "train_vqvae", [1]) == 1


def test_pretraining_leaves_no_host_idle_unasked() -> None:
    with pytest.raises(
        ConfigError, match=r"stage pretrain_coglm: .*; or use the first 4 of the 6 hosts, 32 ranks"
    ):
        hosts_used(PUBLISHED, "pretrain_coglm", [8] * 6)


def test_where_no_part_of_the_hosts_serves_the_reason_is_that_of_all() -> None:
    with pytest.raises(
        ConfigError, match=r"stage train_vqvae: train\.global_batch 64 .* 8 x 6 data-parallel ranks"
    ):
        hosts_used(PUBLISHED, "train_vqvae", [3, 3])
