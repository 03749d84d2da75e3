"""Checkpoint folders: shards, padding, ties, damage, and the check of an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaxelm.errors import ModelError
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import check_export, load_config, load_pretrained, save_pretrained, weights_hash
from megaxelm.recipe import ModelConfig


def make(tied: bool = True, family: str = "llama", seed: int = 0, vocab_size: int = 300, **changes: Any) -> Decoder:
    model = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        max_positions=64,
        tie_embeddings=tied,
    )
    decoder = Decoder(replace(config_from_recipe(model, vocab_size, 1, 2, 3), **changes))
    decoder.initialise(seed)
    return decoder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_weights_come_back_bit_equal(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    decoder = make(tied)
    save_pretrained(decoder, tmp_path, max_shard_bytes=shard_bytes)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (shard_bytes == 20_000)
    again = load_pretrained(tmp_path)
    assert (again.head.weight is again.embed.weight) == tied
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert check_export(tmp_path, decoder, [[1, 2, 299]]) == 0.0
    if index.is_file():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(
            tensor.nbytes for file in set(content["weight_map"].values()) for tensor in load_file(tmp_path / file).values()
        )


def test_files_hold_no_padding_no_second_copy_and_the_format(tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (safe_open is no mapping)
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [300, 16]


def test_a_state_dict_exports_like_the_decoder(tmp_path: Path) -> None:
    decoder = make()
    save_pretrained(decoder, tmp_path / "a")
    state = {name: tensor for name, tensor in decoder.state_dict().items() if name != "head.weight"}
    save_pretrained(state, tmp_path / "b", config=decoder.config)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")


def test_hash_depends_on_weights_and_not_on_shards(tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path / "one")
    save_pretrained(make(), tmp_path / "many", max_shard_bytes=10_000)
    save_pretrained(make(seed=1), tmp_path / "other")
    save_pretrained(make(), tmp_path / "half", dtype=torch.bfloat16)
    hashes = [weights_hash(tmp_path / name) for name in ("one", "many", "other", "half")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_bf16_export_loads_and_passes_the_check(tmp_path: Path) -> None:
    decoder = make()
    save_pretrained(decoder, tmp_path, dtype=torch.bfloat16)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < check_export(tmp_path, decoder, [[1, 2, 299] * 5]) < 3e-2
    assert load_pretrained(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_an_old_bin_checkpoint_loads(tmp_path: Path) -> None:
    decoder = make(family="xglm")
    save_pretrained(decoder, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.embed_positions.weights"] = torch.randn(66, 16)
    torch.save(state, tmp_path / "pytorch_model.bin")
    expected = weights_hash(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    again = load_pretrained(tmp_path)
    assert torch.equal(again.embed.weight, decoder.embed.weight)
    assert weights_hash(tmp_path) != expected, "the second copy of the tied weights counts as content"


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("never", "w"))


def test_a_bin_checkpoint_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        load_pretrained(tmp_path)


def change_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    state = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.norm.weight": None}, "missing tensors: model.norm.weight"),
        ({"model.extra.weight": torch.zeros(1)}, "unexpected tensors: model.extra.weight"),
        ({"model.norm.weight": torch.zeros(17)}, r"model.norm.weight has shape \(17,\)"),
        ({"model.embed_tokens.weight": torch.zeros(384, 16)}, r"embed_tokens.weight has shape \(384, 16\).*\(300, 16\)"),
        ({"lm_head.weight": torch.zeros(300, 16)}, "tie_word_embeddings is true, but lm_head.weight differs"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, torch.Tensor | None], text: str, tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=text):
        load_pretrained(tmp_path)


def test_folders_without_the_needed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(ModelError, match="config.json: no such file"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="not readable as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="config.json: model_type = 'gpt2': the decoder has llama"):
        load_pretrained(tmp_path)
    save_pretrained(make(), tmp_path, max_shard_bytes=10_000)
    (tmp_path / "model-00001-of-00003.safetensors").unlink(missing_ok=True)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ModelError, match=f"not there: .*{first.name}"):
        load_pretrained(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_pretrained(tmp_path)


def test_an_index_cannot_point_outside_of_its_folder(tmp_path: Path) -> None:
    save_pretrained(make(), tmp_path / "model", max_shard_bytes=10_000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="names no files of this folder"):
        load_pretrained(tmp_path / "model")


def test_tokenizer_files_travel_and_a_folder_without_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(ModelError, match="no tokenizer files"):
        save_pretrained(make(), tmp_path / "out", tokenizer_folder=source)
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "sentencepiece.bpe.model", "megaxelm_tokenizer.json"]
    for name in [*names, "stage.json"]:
        (source / name).write_text(name)
    save_pretrained(make(), tmp_path / "out", tokenizer_folder=source)
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(names) <= copied
    assert "stage.json" not in copied


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    decoder = make()
    with torch.no_grad():
        decoder.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match="norm.weight has values that are not finite"):
        save_pretrained(decoder, tmp_path)


def test_a_state_dict_with_missing_or_wrong_tensors_is_not_exported(tmp_path: Path) -> None:
    decoder = make()
    state = dict(decoder.state_dict())
    with pytest.raises(ModelError, match="unexpected tensors: surplus"):
        save_pretrained({**state, "surplus": torch.zeros(1)}, tmp_path, config=decoder.config)
    with pytest.raises(ModelError, match=r"embed.weight has shape \(300, 16\)"):
        save_pretrained({**state, "embed.weight": state["embed.weight"][:300]}, tmp_path, config=decoder.config)
    del state["norm.weight"]
    with pytest.raises(ModelError, match="missing tensors: norm.weight"):
        save_pretrained(state, tmp_path, config=decoder.config)


def test_the_check_fails_for_another_model(tmp_path: Path) -> None:
    decoder = make()
    save_pretrained(make(seed=1), tmp_path)
    with torch.no_grad():
        decoder.embed.weight.mul_(20)
    with pytest.raises(ModelError, match="the reloaded export differs"):
        check_export(tmp_path, decoder, [[1, 2, 3]])


def test_the_check_fails_when_transformers_would_compute_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm.model import decoder as module

    decoder = make()
    with torch.no_grad():
        decoder.embed.weight.mul_(20)
        decoder.layers[0].attention.q.weight.mul_(50)
        decoder.layers[0].attention.k.weight.mul_(50)
    save_pretrained(decoder, tmp_path)
    tables = module.rotary_tables
    monkeypatch.setattr(module, "rotary_tables", lambda positions, *rest, **named: tables(positions * 2, *rest, **named))
    with pytest.raises(ModelError, match="transformers computes other logits"):
        check_export(tmp_path, decoder, [[1, 2, 3] * 8])


def test_a_saved_model_generates_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    decoder = make(vocab_size=301)
    save_pretrained(decoder, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    out = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    text = [1, 5, 6]
    cache = decoder.eval().new_cache(1, 20)
    hidden = decoder.decode(torch.tensor([text]), torch.tensor([3]), cache)
    for _ in range(5):
        scores = decoder.logits(hidden)[0]
        scores[2] = -torch.inf
        text.append(int(scores.argmax()))
        hidden = decoder.decode(torch.tensor([[text[-1]]]), torch.tensor([1]), cache)
    assert out[0].tolist() == text
