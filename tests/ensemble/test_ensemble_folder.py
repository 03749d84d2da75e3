"""The ensemble folder: moves as one, loads lazily, and says what is missing or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_ensemble import write_byte_tokenizer

from megaxelm.cluster.space import TfidfSpace
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.ensemble.folder import EnsembleSettings, load_ensemble, save_ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.routers import RouterData
from megaxelm.errors import MegaxelmError, RoutingError
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import TfidfConfig

ROUTERS = ["language", "tfidf", "posterior", "uniform", "fixed"]
TEXTS = ["the cat sat on the mat", "a dog ran in a park", "кот сидел на ковре", "собака бежала в парке"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, decoders: list[Decoder]) -> Path:
    """A folder with a tokenizer and three exports."""
    root = tmp_path_factory.mktemp("parts")
    write_byte_tokenizer(root / "tokenizer")
    for number in range(3):
        save_pretrained(decoders[number], root / "exports" / f"e{number}", tokenizer_folder=root / "tokenizer")
    return root


def save(parts: Path, out: Path, analyzer: str = "subword") -> None:
    tokenizer = Tokenizer.load(parts / "tokenizer")
    space = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer=analyzer, dimensions=3), 0, tokenizer)
    vectors = torch.from_numpy(space.transform(TEXTS))
    data = RouterData(
        ["e0", "e1", "e2"],
        language_expert={"en": "e0", "ru": "e1"},
        fixed_weights={"e0": 0.5, "e2": 0.5},
        temperature=0.3,
        distance_power=4,
        posterior_prior=[0.5, 0.25, 0.25],
        posterior_decay=0.9,
        space=space,
        centres=torch.stack([vectors[0], vectors[2], vectors[1]]),
    )
    exports = {f"e{number}": parts / "exports" / f"e{number}" for number in range(3)}
    tokens = {"e0": {"en": 100}, "e1": {"ru": 200}, "e2": {}}
    save_ensemble(out, exports, parts / "tokenizer", data, EnsembleSettings("tfidf", 2), tokens)


@pytest.fixture
def folder(parts: Path, tmp_path: Path) -> Path:
    save(parts, tmp_path / "ensemble")
    return tmp_path / "ensemble"


def outputs(folder: Path) -> list[tuple[list[int], list[float], str]]:
    ensemble = load_ensemble(folder)
    found = []
    for router in ROUTERS:
        for result in generate(ensemble, ["the dog", "кот"], ["en", "ru"], max_new_tokens=6, router=router):
            found.append((result.token_ids, result.logprobs, result.text))
    return found


@pytest.mark.parametrize("analyzer", ["subword", "char"])
def test_a_moved_folder_gives_the_same_output(analyzer: str, parts: Path, tmp_path: Path) -> None:
    save(parts, tmp_path / "ensemble", analyzer)
    before = outputs(tmp_path / "ensemble")
    elsewhere = tmp_path / "other" / "place"
    elsewhere.parent.mkdir()
    shutil.copytree(tmp_path / "ensemble", elsewhere)
    shutil.rmtree(tmp_path / "ensemble")
    assert outputs(elsewhere) == before


def test_everything_said_comes_back(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    assert ensemble.experts == ["e0", "e1", "e2"]
    assert ensemble.settings == EnsembleSettings("tfidf", 2, "mixture")
    assert ensemble.languages == {"e0": {"en": 100}, "e1": {"ru": 200}, "e2": {}}
    data = ensemble.data
    assert (data.temperature, data.distance_power, data.posterior_decay, data.posterior_prior) == (0.3, 4, 0.9, [0.5, 0.25, 0.25])
    assert (data.language_expert, data.fixed_weights) == ({"en": "e0", "ru": "e1"}, {"e0": 0.5, "e2": 0.5})
    assert ensemble.router().name == "tfidf"


def test_loaded_experts_are_the_exported_ones(folder: Path, decoders: list[Decoder]) -> None:
    ensemble = load_ensemble(folder)
    tokens, bounds = torch.tensor([1, 50, 60]), torch.tensor([0, 3], dtype=torch.int32)
    for number in range(3):
        loaded = ensemble.decoder(number)
        found, expected = (model.logits(model(tokens, torch.arange(3), bounds)) for model in (loaded, decoders[number]))
        assert torch.allclose(found, expected, atol=1e-5)


def test_experts_load_only_when_asked(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    generate(ensemble, ["the"], ["en"], max_new_tokens=2, router="language")
    assert list(ensemble._decoders) == [0]


def test_files_name_no_place_of_the_machine(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(), path


def test_experts_are_hard_links_to_the_exports(folder: Path, parts: Path) -> None:
    assert (folder / "experts/e0/model.safetensors").samefile(parts / "exports/e0/model.safetensors")


def test_where_links_are_refused_experts_are_copied(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    save(parts, tmp_path / "ensemble")
    copy, source = tmp_path / "ensemble/experts/e0/model.safetensors", parts / "exports/e0/model.safetensors"
    assert not copy.samefile(source) and copy.read_bytes() == source.read_bytes()


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not an ensemble folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "a list where an object was written"),
        (lambda folder: change_json(folder / "config.json", model_type="llama"), "model_type = 'llama'"),
        (lambda folder: change_json(folder / "config.json", format=99), "format = 99"),
        (lambda folder: change_json(folder / "config.json", experts=[]), "names no expert"),
        (lambda folder: change_json(folder / "config.json", experts=[{"name": "e0"}]), "damaged"),
        (lambda folder: change_json(folder / "config.json", experts=3), "damaged"),
        (lambda folder: change_json(folder / "config.json", experts=[{"name": "a", "folder": "../x", "languages": {}}]), "leads out"),
        (lambda folder: change_json(folder / "config.json", experts=[{"name": "a", "folder": "/x", "languages": {}}]), "leads out"),
        (lambda folder: change_json(folder / "config.json", router="best"), "router = 'best'"),
        (lambda folder: change_json(folder / "config.json", top_m=9), "top_m = 9: choose 1 to 3"),
        (lambda folder: change_json(folder / "config.json", top_m="two"), "top_m = two"),
        (lambda folder: change_json(folder / "config.json", combine="sum"), "combine = 'sum'"),
        (lambda folder: shutil.rmtree(folder / "experts" / "e1"), "expert e1 is missing"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
        (lambda folder: shutil.rmtree(folder / "router"), "router.json"),
        (lambda folder: (folder / "router" / "router.json").write_text("{}"), "temperature.*missing"),
        (lambda folder: change_json(folder / "router" / "router.json", temperature="warm"), "temperature = 'warm'"),
        (lambda folder: (folder / "router" / "centres.safetensors").unlink(), "centres.safetensors"),
        (lambda folder: (folder / "router" / "centres.safetensors").write_bytes(b"x" * 20), "centres.safetensors"),
        (lambda folder: (folder / "router" / "space.safetensors").write_bytes(b"x" * 20), "space"),
        (lambda folder: (folder / "router" / "space.json").unlink(), "space.json"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], text: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(MegaxelmError, match=text):
        load_ensemble(folder)


def test_a_truncated_expert_is_named_when_it_is_needed(parts: Path, tmp_path: Path) -> None:
    save(parts, tmp_path / "linked")
    shutil.copytree(tmp_path / "linked", tmp_path / "ensemble")  # its own files: a hard link would damage the export too
    weights = tmp_path / "ensemble/experts/e1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ensemble = load_ensemble(tmp_path / "ensemble")
    generate(ensemble, ["a"], max_new_tokens=1, expert="e0")
    with pytest.raises(MegaxelmError, match="e1"):
        generate(ensemble, ["a"], max_new_tokens=1, expert="e1")


def test_an_expert_of_another_vocabulary_is_refused(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    ensemble.tokenizer.vocab_size = 300
    with pytest.raises(RoutingError, match="expert e0: its vocabulary has 260 pieces, the ensemble's tokenizer 300"):
        ensemble.decoder(0)


def test_a_missing_export_names_the_expert(parts: Path, tmp_path: Path) -> None:
    exports = {"e0": parts / "exports" / "e0", "e9": parts / "exports" / "e9"}
    with pytest.raises(RoutingError, match="expert e9: no export"):
        save_ensemble(tmp_path / "out", exports, parts / "tokenizer", RouterData(["e0", "e9"]))
