"""An ensemble of low-rank deltas: its folder, and that it writes what the merged experts write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from byte_ensemble import VOCABULARY, byte_decoder, write_byte_tokenizer

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import EnsembleSettings, load_ensemble, save_ensemble
from megaxelm.ensemble.generation import GenerationResult, generate
from megaxelm.ensemble.routers import RouterData
from megaxelm.ensemble.running import GenerationRequest
from megaxelm.ensemble.sampling import SamplingParams
from megaxelm.errors import RoutingError
from megaxelm.model.adapter_files import base_folder, save_adapter
from megaxelm.model.export import export_to
from megaxelm.model.hub import open_pretrained, save_pretrained
from megaxelm.model.lora import adapted_source, lora_from_recipe, lora_shapes
from megaxelm.recipe import LoraConfig

NAMES = ["north", "south", "west"]
ROUTERS = ["posterior", "uniform", "fixed"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`experts/<name>/export`: a seed and three adapters over it; `merged/<name>`: the same experts as whole checkpoints."""
    root = tmp_path_factory.mktemp("deltas")
    write_byte_tokenizer(root / "tokenizer")
    seed = root / "experts" / "seed" / "export"
    save_pretrained(byte_decoder(0), seed, tokenizer_folder=root / "tokenizer")
    base = open_pretrained(seed)
    lora = lora_from_recipe(LoraConfig(rank=4), base.config)
    for number, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(number)
        tensors = {key: 0.15 * torch.randn(shape, generator=generator) for key, shape in lora_shapes(base.config, lora).items()}
        source = adapted_source(base, lora, tensors.__getitem__, seed)
        save_adapter(source, root / "experts" / name / "export", torch.float32, root / "tokenizer")
        export_to(source, root / "merged" / name, "float32", root / "tokenizer", [[1, 5, 9]])
    return root


def save(parts: Path, out: Path, *, merged: bool = False, fallback: bool = True) -> Path:
    names = [*NAMES, "seed"] if fallback else NAMES
    exports = {name: parts / "merged" / name if merged and name != "seed" else parts / "experts" / name / "export" for name in names}
    data = RouterData(names, fixed_weights={"north": 0.5, "west": 0.5}, fallback="seed" if fallback else None)
    save_ensemble(out, exports, parts / "tokenizer", data, EnsembleSettings("posterior"))
    return out


def written(folder: Path, **options: object) -> list[GenerationResult]:
    ensemble = load_ensemble(folder)
    prompts = ["the old house", "a", "кот и", "quiet people sing"]
    found = [generate(ensemble, prompts, max_new_tokens=12, temperature=0.0, router=router, **options) for router in ROUTERS]  # type: ignore[arg-type]
    return [result for results in found for result in results]


@pytest.mark.parametrize("fallback", [True, False])
def test_greedy_texts_are_those_of_the_merged_experts(fallback: bool, parts: Path, tmp_path: Path) -> None:
    deltas = written(save(parts, tmp_path / "deltas", fallback=fallback))
    whole = written(save(parts, tmp_path / "whole", merged=True, fallback=fallback))
    assert [result.token_ids for result in deltas] == [result.token_ids for result in whole]
    for ours, theirs in zip(deltas, whole, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert len({tuple(result.token_ids) for result in deltas}) > 4, "texts must differ for the comparison to mean something"


def test_the_base_lies_in_the_folder_once_and_moves_with_it(parts: Path, tmp_path: Path) -> None:
    with_seed, without = save(parts, tmp_path / "a"), save(parts, tmp_path / "b", fallback=False)
    assert not (with_seed / "base").exists() and base_folder(with_seed / "experts" / "north") == with_seed / "experts" / "seed"
    assert [entry.get("base") for entry in json.loads((without / "config.json").read_text())["experts"]] == ["base"] * 3
    assert len(list(without.rglob("model.safetensors"))) == 1 and len(list(without.rglob("adapter_model.safetensors"))) == 3
    before = written(without)
    shutil.copytree(without, tmp_path / "elsewhere" / "place")
    shutil.rmtree(without)
    assert [result.logprobs for result in written(tmp_path / "elsewhere" / "place")] == [result.logprobs for result in before]
    # What the exports say of themselves is as it was.
    assert base_folder(parts / "experts" / "north" / "export") == parts / "experts" / "seed" / "export"


def test_memory_of_the_engine_is_that_of_one_expert_and_deltas(parts: Path, tmp_path: Path) -> None:
    deltas = load_ensemble(save(parts, tmp_path / "deltas")).stack().weights
    whole = load_ensemble(save(parts, tmp_path / "whole", merged=True)).stack().weights
    one = load_ensemble(save(parts, tmp_path / "alone")).stack([3]).weights
    assert deltas.shared == set(deltas.layout)
    assert one.nbytes < deltas.nbytes < 2.2 * one.nbytes and deltas.nbytes < whole.nbytes


def test_resident_experts_take_turns(parts: Path, tmp_path: Path) -> None:
    ensemble = load_ensemble(save(parts, tmp_path / "deltas"))

    def tokens(resident: int | None) -> list[list[int]]:
        engine = Engine(ensemble, router="uniform", resident=resident)
        found: dict[int, list[int]] = {}
        for prompt in ("the old house", "a"):
            engine.add(GenerationRequest(prompt, None, SamplingParams(8, 0.0)))
        while engine.has_work:
            for event in engine.step():
                found.setdefault(event.request_id, []).append(event.token_id)
        return list(found.values())

    assert tokens(None) == tokens(1)


def test_a_decoder_of_an_expert_is_the_merged_one(parts: Path, tmp_path: Path) -> None:
    deltas, whole = load_ensemble(save(parts, tmp_path / "deltas")), load_ensemble(save(parts, tmp_path / "whole", merged=True))
    for name, parameter in deltas.decoder(1).named_parameters():
        assert torch.equal(parameter, whole.decoder(1).get_parameter(name)), name
    assert deltas.decoder(1).config.vocab_size == VOCABULARY


def test_a_base_that_is_missing_or_elsewhere_is_told(parts: Path, tmp_path: Path) -> None:
    folder = save(parts, tmp_path / "a", fallback=False)
    shutil.move(folder / "base", tmp_path / "base")
    with pytest.raises(RoutingError, match=r"the base of the expert north is missing \(base/config.json\); build it again"):
        load_ensemble(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["experts"][0]["base"] = "../base"
    path.write_text(json.dumps(config))
    with pytest.raises(RoutingError, match="leads out of the ensemble folder"):
        load_ensemble(folder)
    on_hub = tmp_path / "hub" / "export"
    shutil.copytree(parts / "experts" / "north" / "export", on_hub)
    adapter = on_hub / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": "some/model"}))
    with pytest.raises(RoutingError, match="its base is some/model, a name on the hub"):
        save_ensemble(tmp_path / "b", {"north": on_hub}, parts / "tokenizer", RouterData(["north"]))


def test_the_hugging_face_class_takes_it(parts: Path, tmp_path: Path) -> None:
    from megaxelm.ensemble.huggingface import XelmForCausalLM

    folder = save(parts, tmp_path / "deltas", fallback=False)
    deltas = XelmForCausalLM.from_pretrained(folder, dtype="auto")
    whole = XelmForCausalLM.from_pretrained(save(parts, tmp_path / "whole", merged=True, fallback=False))
    tokens = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        torch.testing.assert_close(deltas(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-4)


def test_types_are_found_at_the_base(parts: Path, tmp_path: Path) -> None:
    from megaxelm.ensemble.huggingface import _dtype

    folder = save(parts, tmp_path / "deltas", fallback=False)
    path = folder / "base" / "config.json"
    content = json.loads(path.read_text()) | {"dtype": "bfloat16"}
    path.unlink()
    path.write_text(json.dumps(content))
    assert _dtype("auto", folder) == torch.bfloat16
