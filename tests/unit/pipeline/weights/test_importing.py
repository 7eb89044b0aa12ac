import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_weights import (
    ROWS,
    rank_state,
    sat_config,
    sat_directory,
    save_archive,
    transformer_state,
    vqvae_file,
    vqvae_state,
)
from safetensors.torch import load_file, save_file

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.pipeline.weights.importing import Wanted, import_weights
from cogview2.pipeline.weights_manifest import digests

HEADS4 = Wanted(heads=4)


def _same(folder: Path, state: dict[str, torch.Tensor], kind: str = "coglm") -> None:
    stored = load_file(folder / f"{kind}.safetensors")
    assert stored.keys() == state.keys()
    for name, tensor in state.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_published_directory_of_any_degree(tmp_path: Path, parts: int, legacy: bool) -> None:
    state = transformer_state(rows=32)
    source = sat_directory(
        tmp_path / "src", state, parts=parts, legacy=legacy, config=sat_config(vocab_size=ROWS)
    )
    report = import_weights("coglm", source, tmp_path / "dst", Wanted())
    state["transformer.word_embeddings.weight"] = state["transformer.word_embeddings.weight"][:ROWS]
    _same(tmp_path / "dst", state)
    facts = WeightsFolder(tmp_path / "dst").facts.models.coglm
    assert facts is not None and (facts.iteration, facts.rows, facts.dtype) == (432000, ROWS, "float16")
    assert facts.parameters == sum(tensor.numel() for tensor in state.values())
    text = "\n".join(report.lines)
    assert "2 padded rows" in text and "np_rng_state" not in text and "torch_rng_state" in text


@pytest.mark.parametrize("place", ["432000", "432000/mp_rank_00_model_states.pt"])
def test_an_iteration_or_one_part_by_itself(tmp_path: Path, place: str) -> None:
    state = transformer_state()
    source = sat_directory(tmp_path / "src", state) / place
    import_weights("coglm", source, tmp_path / "dst", HEADS4)
    _same(tmp_path / "dst", state)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "state_dict.", "state/", "net.core."])
def test_prefixes_are_taken_off(tmp_path: Path, prefix: str) -> None:
    state = transformer_state()
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "dst", HEADS4)
    _same(tmp_path / "dst", state)


def test_of_two_models_the_published_prefix_wins_or_the_file_is_refused(tmp_path: Path) -> None:
    state, other = transformer_state(), transformer_state(seed=1)
    torch.save({"module": state, "ema": other}, tmp_path / "w.pt")
    import_weights("coglm", tmp_path / "w.pt", tmp_path / "dst", HEADS4)
    _same(tmp_path / "dst", state)
    torch.save({"one": state, "ema": other}, tmp_path / "v.pt")
    with pytest.raises(CheckpointError, match=r"holds several models, under ema\., one\."):
        import_weights("coglm", tmp_path / "v.pt", tmp_path / "dst2", HEADS4)


@pytest.mark.parametrize("by_name", [True, False])
def test_shards_with_an_index(tmp_path: Path, by_name: bool) -> None:
    state = transformer_state()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = tmp_path / "model.safetensors.index.json" if by_name else tmp_path
    import_weights("coglm", source, tmp_path / "dst", HEADS4)
    _same(tmp_path / "dst", state)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "", ".", 3])
def test_an_index_stays_in_its_folder(tmp_path: Path, file: Any) -> None:
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        import_weights("coglm", tmp_path / "m.index.json", tmp_path / "dst", HEADS4)


def test_sizes_come_from_the_json_beside_or_the_one_named(tmp_path: Path) -> None:
    state = transformer_state()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="pass --heads N"):
        import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "none", Wanted())
    (tmp_path / "model_config.json").write_text(json.dumps(sat_config(num_attention_heads=8)))
    import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "a", Wanted())
    (tmp_path / "w.json").write_text(json.dumps(sat_config(num_attention_heads=2)))
    import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "b", Wanted())
    (tmp_path / "c.json").write_text(json.dumps(sat_config(num_attention_heads=1)))
    import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "c", Wanted(config=tmp_path / "c.json"))
    heads = []
    for name in "abc":
        facts = WeightsFolder(tmp_path / name).facts.models.coglm
        assert facts is not None
        heads.append(facts.config.heads)
    assert heads == [8, 2, 1]


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    state = transformer_state()
    gone = [name for name in state if ".1.mlp." in name or name.endswith("final_layernorm.bias")]
    save_file({name: state[name] for name in state if name not in gone}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "dst", HEADS4)
    assert "lacks 5 of the 36 tensors of a coglm" in str(caught.value)
    assert all(name in str(caught.value) for name in gone)
    assert not (tmp_path / "dst").exists()


def test_unexpected_tensors_are_named_and_left_out(tmp_path: Path) -> None:
    iterative, direct = transformer_state(extra="iterative"), transformer_state(extra="direct")
    extra = {name: tensor for name, tensor in direct.items() if "attention_plus" in name}
    torch.save({"module": iterative | extra}, tmp_path / "w.pt")
    (tmp_path / "w.json").write_text(json.dumps(sat_config(layout=[4, 40])))
    with pytest.raises(CheckpointError, match="8 tensors that no iterative-sr has: mixins.attention_plus"):
        import_weights("iterative-sr", tmp_path / "w.pt", tmp_path / "dst", Wanted(strict=True))
    report = import_weights("iterative-sr", tmp_path / "w.pt", tmp_path / "dst", Wanted())
    assert "mixins.attention_plus" in report.warnings[0] and "3 more" in report.warnings[0]
    _same(tmp_path / "dst", iterative, "iterative-sr")


def test_wrong_shapes_and_integers_are_named(tmp_path: Path) -> None:
    state = transformer_state()
    state["transformer.layers.1.attention.dense.bias"] = torch.zeros(15)
    state["transformer.final_layernorm.bias"] = torch.zeros(16, dtype=torch.int64)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        import_weights("coglm", tmp_path / "w.pt", tmp_path / "dst", HEADS4)
    assert "attention.dense.bias has the shape (15,) instead of (16,)" in str(caught.value)
    assert "final_layernorm.bias is int64, not a floating-point number" in str(caught.value)


def test_another_kind_is_guessed(tmp_path: Path) -> None:
    save_file(transformer_state(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="is it another --kind"):
        import_weights("icetk-image", tmp_path / "w.safetensors", tmp_path / "dst", Wanted())
    save_file(transformer_state(extra="iterative"), tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match="it looks like a iterative-sr"):
        import_weights("direct-sr", tmp_path / "v.safetensors", tmp_path / "dst", HEADS4)


def test_a_dtype_is_kept_or_cast(tmp_path: Path) -> None:
    state = transformer_state(dtype=torch.bfloat16)
    torch.save(state, tmp_path / "w.pt")
    import_weights("coglm", tmp_path / "w.pt", tmp_path / "kept", HEADS4)
    _same(tmp_path / "kept", state)
    import_weights("coglm", tmp_path / "w.pt", tmp_path / "cast", Wanted(heads=4, dtype=torch.float32))
    _same(tmp_path / "cast", {name: tensor.float() for name, tensor in state.items()})


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_import_needs_replace_and_leaves_one_file(tmp_path: Path) -> None:
    first, second = transformer_state(), transformer_state(seed=1)
    torch.save(first, tmp_path / "a.pt")
    torch.save(second, tmp_path / "b.pt")
    folder = tmp_path / "dst"
    import_weights("coglm", tmp_path / "a.pt", folder, HEADS4)
    before = _content(folder)
    with pytest.raises(CheckpointError, match="holds coglm already; pass --replace"):
        import_weights("coglm", tmp_path / "b.pt", folder, HEADS4)
    assert _content(folder) == before
    for _ in range(2):
        import_weights("coglm", tmp_path / "b.pt", folder, Wanted(heads=4, replace=True))
        assert len(_content(folder)) == 2
        model = WeightsFolder(folder).coglm()
        assert torch.equal(model.transformer.final_layernorm.bias, second["transformer.final_layernorm.bias"])


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dst"
    bad = transformer_state()
    bad["transformer.final_layernorm.weight"][2] = float("nan")
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="not finite"):
        import_weights("coglm", tmp_path / "bad.pt", folder, HEADS4)
    assert not folder.parent.exists()
    torch.save(transformer_state(), tmp_path / "good.pt")
    import_weights("coglm", tmp_path / "good.pt", folder, HEADS4)
    before = _content(folder)
    with pytest.raises(CheckpointError, match="not finite"):
        import_weights("coglm", tmp_path / "bad.pt", folder, Wanted(heads=4, replace=True))
    assert _content(folder) == before
    import_weights("coglm", tmp_path / "bad.pt", folder, Wanted(heads=4, replace=True, allow_nonfinite=True))


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    torch.save(transformer_state(), tmp_path / "a.pt")
    for name in ("home", "home/thesis.txt"):
        with pytest.raises(CheckpointError, match="another one|is a file"):
            import_weights("coglm", tmp_path / "a.pt", tmp_path / name, HEADS4)
    assert os.listdir(tmp_path / "home") == ["thesis.txt"]


BAD_DIRECTORIES: dict[str, tuple[Any, str]] = {
    "empty latest": (lambda d: (d / "latest").write_text(""), "is no iteration"),
    "latest leads out": (lambda d: (d / "latest").write_text("../src/432000"), "is no iteration"),
    "latest to nowhere": (lambda d: (d / "latest").write_text("9"), "is no folder"),
    "first part gone": (lambda d: (d / "432000/mp_rank_00_model_states.pt").unlink(), "none of rank 0"),
    "parts of two models": (
        lambda d: save_archive(
            d / "432000/mp_rank_01_model_states.pt", {"module": rank_state(transformer_state(seed=5), 1, 2)}
        ),
        "should be the same on every part",
    ),
    "parts with other names": (
        lambda d: save_archive(
            d / "432000/mp_rank_01_model_states.pt",
            {"module": rank_state(transformer_state(extra="iterative"), 1, 2)},
        ),
        "differ in mixins.extra_position_embedding",
    ),
    "config is no JSON": (lambda d: (d / "model_config.json").write_text("{"), "is not JSON"),
    "config is a list": (lambda d: (d / "model_config.json").write_text("[]"), "not a table"),
    "config too deep": (lambda d: (d / "model_config.json").write_text("[" * 99999), "is not JSON"),
    "no parts": (
        lambda d: [path.unlink() for path in (d / "432000").iterdir()],
        "has no mp_rank_00_model_states.pt",
    ),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_bad_directories_are_refused(tmp_path: Path, case: str) -> None:
    source = sat_directory(tmp_path / "src", transformer_state(), parts=2)
    change, words = BAD_DIRECTORIES[case]
    change(source)
    with pytest.raises(CheckpointError, match=words):
        import_weights("coglm", source, tmp_path / "dst", Wanted())
    assert not (tmp_path / "dst").exists()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        import_weights("coglm", tmp_path / "src", tmp_path / "dst", Wanted())


def test_a_vqvae_without_moving_averages(tmp_path: Path) -> None:
    state = vqvae_state()
    averages = ("quantize.cluster_size", "quantize.embed_avg")
    vqvae_file(tmp_path / "ice_image.pt", {k: v for k, v in state.items() if k not in averages})
    report = import_weights("icetk-image", tmp_path / "ice_image.pt", tmp_path / "dst", Wanted())
    assert "quantize.cluster_size, quantize.embed_avg: not in the source" in report.lines[0]
    model = WeightsFolder(tmp_path / "dst").vqvae()
    quantizer = model.quantizer
    assert quantizer.embed.weight.dtype == torch.float32 and model.enc.conv_in.weight.dtype == torch.float16
    assert torch.equal(quantizer.embed_avg / quantizer.cluster_size[:, None], quantizer.embed.weight)
    only_one = {k: v for k, v in state.items() if k != averages[0]}
    vqvae_file(tmp_path / "ice_image.pt", only_one)
    import_weights("icetk-image", tmp_path / "ice_image.pt", tmp_path / "dst2", Wanted())
    worse = {k: v for k, v in only_one.items() if k != "quantize.proj.bias"}
    vqvae_file(tmp_path / "ice_image.pt", worse)
    with pytest.raises(CheckpointError, match="quantize.proj.bias"):
        import_weights("icetk-image", tmp_path / "ice_image.pt", tmp_path / "dst3", Wanted())


def test_published_clusters(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.int32) % 5
    np.save(tmp_path / "cluster_label.npy", labels)
    vqvae_file(tmp_path / "ice_image.pt", vqvae_state())
    folder = tmp_path / "dst"
    import_weights("icetk-image", tmp_path / "ice_image.pt", folder, Wanted())
    assert WeightsFolder(folder).labels() is None
    report = import_weights("clusters", tmp_path / "cluster_label.npy", folder, Wanted())
    assert "12 codes in 5 clusters" in report.lines[0]
    found = WeightsFolder(folder).labels()
    assert found is not None and found.dtype == torch.int64 and found.tolist() == labels.tolist()
    with pytest.raises(CheckpointError, match="pass --replace"):
        import_weights("clusters", tmp_path / "cluster_label.npy", folder, Wanted())
    np.save(tmp_path / "short.npy", labels[:-1])
    with pytest.raises(CheckpointError, match="clusters of 11 codes, but the codebook has 12"):
        import_weights("clusters", tmp_path / "short.npy", folder, Wanted(replace=True))


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_sizes_of_pictures_follow_the_models(tmp_path: Path, rate: Any) -> None:
    torch.save(transformer_state(extra="direct"), tmp_path / "d.pt")
    (tmp_path / "d.json").write_text(json.dumps(sat_config(layout=[8, 17, 53])))
    import_weights("direct-sr", tmp_path / "d.pt", tmp_path / "dst", Wanted(rate=rate))
    data = WeightsFolder(tmp_path / "dst").data
    assert (data.base_grid, data.superres_ratio, data.compression_rate) == (3, 2, rate)
    assert (data.base_size, data.superres_grid) == (3 * rate, 6)
    torch.save(transformer_state(), tmp_path / "c.pt")
    import_weights("coglm", tmp_path / "c.pt", tmp_path / "dst", HEADS4)
    assert WeightsFolder(tmp_path / "dst").data == data


def test_imports_side_by_side_keep_each_others_models(tmp_path: Path) -> None:
    torch.save(transformer_state(), tmp_path / "a.pt")
    torch.save(transformer_state(seed=1), tmp_path / "b.pt")
    torch.save(transformer_state() | {"transformer.final_layernorm.bias": torch.ones(3)}, tmp_path / "bad.pt")
    vqvae_file(tmp_path / "i.pt", vqvae_state())
    jobs = [
        ("coglm", "bad.pt"),
        ("coglm", "a.pt"),
        ("coglm", "b.pt"),
        ("icetk-image", "i.pt"),
        ("coglm", "bad.pt"),
    ]
    refused = []

    def run(kind: str, name: str) -> None:
        try:
            import_weights(kind, tmp_path / name, tmp_path / "dst", Wanted(heads=4))
        except CheckpointError:
            refused.append(name)

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and refused.count("bad.pt") == 2
    folder = WeightsFolder(tmp_path / "dst")
    assert folder.kinds() == ("icetk-image", "coglm")
    assert fsops.sha256_file(folder.file("coglm")) == digests(folder.path, ["coglm"])["coglm"]
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]


CLAIMS: list[dict[str, Any]] = [
    {"config": {"layers": 10**7, "hidden": 16, "heads": 2}, "rows": 32},
    {"config": {"layers": 2, "hidden": 2**40, "heads": 2}, "rows": 32},
    {"config": {"layers": 2, "hidden": 16, "heads": 2}, "rows": 2**62},
    {"config": {"layers": 2, "hidden": 16, "heads": 2, "max_positions": 2**61}, "rows": 32},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=["layers", "hidden", "rows", "positions"])
def test_sizes_that_a_file_claims_are_bounded(tmp_path: Path, claim: dict[str, Any]) -> None:
    save_file(transformer_state(), tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps({"cogview2": claim}))
    with pytest.raises(CheckpointError, match="has no sizes of a coglm"):
        import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "dst", Wanted())
    assert not (tmp_path / "dst").exists()


def test_names_of_countless_layers_are_refused(tmp_path: Path) -> None:
    state = transformer_state() | {f"transformer.layers.{n}.x": torch.empty(0) for n in range(3000)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="has no sizes of a coglm"):
        import_weights("coglm", tmp_path / "w.safetensors", tmp_path / "dst", HEADS4)


def test_what_a_killed_first_import_left_is_in_nobodys_way(tmp_path: Path) -> None:
    save_file(transformer_state(), tmp_path / "w.safetensors")
    folder = tmp_path / "dst"
    folder.mkdir()
    (folder / "coglm.safetensors").write_text("half")
    (folder / ".tmp.coglm.safetensors.0123abcd").write_text("half")
    import_weights("coglm", tmp_path / "w.safetensors", folder, HEADS4)
    assert sorted(os.listdir(folder)) == ["coglm.safetensors", "weights.json"]
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("thesis.tex", ".tmp.coglm.safetensors.0123abcd"):
        (mine / name).write_text("keep me")
    with pytest.raises(CheckpointError, match="another one"):
        import_weights("coglm", tmp_path / "w.safetensors", mine, HEADS4)
    assert len(os.listdir(mine)) == 2
