"""The ensemble folder: moves as one, loads lazily, and says what is missing or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_ensemble import write_byte_tokenizer
from ranks import run_ranks

from megaxelm.cli.generate import generate as generate_command
from megaxelm.cluster.space import TfidfSpace
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.ensemble.folder import Ensemble, EnsembleSettings, load_ensemble, save_ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.routers import Router, RouterData, make_router
from megaxelm.ensemble.shards import Shards
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


def save(parts: Path, out: Path, analyzer: str = "subword", centre_experts: list[int] | None = None) -> None:
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
        centres=torch.stack([vectors[0], vectors[2], vectors[1]] + ([] if centre_experts is None else [vectors[3]])),
        centre_experts=centre_experts,
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
    assert (ensemble.trained, ensemble.fallback) == (ensemble.experts, None)


@pytest.fixture
def with_fallback(parts: Path, tmp_path: Path) -> Path:
    """Two trained experts and e2 as their fallback, every setting other than its default."""
    tokenizer = Tokenizer.load(parts / "tokenizer")
    space = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer="subword", dimensions=3), 0, tokenizer)
    data = RouterData(
        ["e0", "e1", "e2"],
        language_expert={"en": "e0", "ru": "e1"},
        detect_language=False,
        fixed_weights={"e1": 1.0},
        posterior_prior=[1.0, 3.0],
        posterior_reads="all",
        refresh="frozen",
        refresh_tokens=7,
        fallback="e2",
        fallback_weight=0.2,
        fallback_distance=[0.5, 1.5],
        space=space,
        centres=torch.from_numpy(space.transform(TEXTS)[1:3]),
    )
    exports = {f"e{number}": parts / "exports" / f"e{number}" for number in range(3)}
    settings = EnsembleSettings("posterior", 1, "logit_mean", "experts")
    save_ensemble(tmp_path / "ensemble", exports, parts / "tokenizer", data, settings, {"e0": {"en": 100}, "e1": {"ru": 200}})
    return tmp_path / "ensemble"


def test_a_fallback_and_the_new_settings_come_back(with_fallback: Path) -> None:
    ensemble = load_ensemble(with_fallback)
    assert (ensemble.experts, ensemble.trained, ensemble.fallback) == (["e0", "e1", "e2"], ["e0", "e1"], "e2")
    assert ensemble.settings == EnsembleSettings("posterior", 1, "logit_mean", "experts")
    data = ensemble.data
    assert (data.detect_language, data.posterior_reads, data.refresh, data.refresh_tokens) == (False, "all", "frozen", 7)
    assert (data.fallback_weight, data.fallback_distance, data.posterior_prior) == (0.2, [0.5, 1.5], [1.0, 3.0])
    assert [entry["fallback"] for entry in json.loads((with_fallback / "config.json").read_text())["experts"]] == [False, False, True]
    for name in ROUTERS:
        router = ensemble.router(name)
        assert (router.num_experts, router.fallback) == (3, 2)
        assert router.constant_from == (7 if name in ("tfidf", "posterior") else 0)
    found = generate(ensemble, ["the dog", "qq"], ["en", "xx"], max_new_tokens=4, router="language", stop_at_eos=False)
    assert [result.mean_weights() for result in found] == [{"e0": 1, "e1": 0, "e2": 0}, {"e0": 0, "e1": 0, "e2": 1}]
    [found] = generate(ensemble, ["the dog"], max_new_tokens=4, router="fixed", stop_at_eos=False)
    assert found.mean_weights() == pytest.approx({"e0": 0, "e1": 0.8, "e2": 0.2})


def test_top_m_counts_trained_experts_only(with_fallback: Path) -> None:
    ensemble = load_ensemble(with_fallback)
    [found] = generate(ensemble, ["the dog"], max_new_tokens=3, router="uniform", top_m=1, stop_at_eos=False)
    assert found.mean_weights() == pytest.approx({"e0": 0.8, "e1": 0, "e2": 0.2})
    with pytest.raises(RoutingError, match="top_m = 3: choose 1 to 2"):
        generate(ensemble, ["the dog"], router="uniform", top_m=3)
    change_json(with_fallback / "config.json", top_m=3)
    with pytest.raises(RoutingError, match="top_m = 3: choose 1 to 2"):
        load_ensemble(with_fallback)


@pytest.mark.parametrize("fallbacks", [[True, False, False], [False, True, True]])
def test_a_fallback_that_is_not_the_last_expert_is_damage(fallbacks: list[bool], with_fallback: Path) -> None:
    entries = json.loads((with_fallback / "config.json").read_text())["experts"]
    entries = [entry | {"fallback": fallback} for entry, fallback in zip(entries, fallbacks, strict=True)]
    change_json(with_fallback / "config.json", experts=entries)
    with pytest.raises(RoutingError, match="is not the last expert; build the ensemble again"):
        load_ensemble(with_fallback)


def test_a_fallback_must_be_saved_last(parts: Path, tmp_path: Path) -> None:
    exports = {f"e{number}": parts / "exports" / f"e{number}" for number in range(2)}
    with pytest.raises(RoutingError, match="the fallback e0 must be the last expert"):
        save_ensemble(tmp_path / "out", exports, parts / "tokenizer", RouterData(["e0", "e1"], fallback="e0"))


def test_the_command_line_takes_settings_of_routers_and_tells_the_language(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}

    def remember(ensemble: Ensemble, name: str | None = None, **overrides: object) -> Router:
        made.update(overrides, name=name)
        return make_router(name or "tfidf", ensemble.data, **overrides)

    monkeypatch.setattr(Ensemble, "router", remember)
    generate_command(folder, ["Все люди"], router="language", max_new_tokens=2)
    assert "language ru (detected); mean weights: e1 1.00" in capsys.readouterr().err and made == {"name": "language"}
    options = {"refresh": "chunk", "refresh_tokens": 3, "posterior_reads": "all"}
    generate_command(folder, ["a"], router="posterior", max_new_tokens=2, posterior_decay="one-step", **options)  # type: ignore[arg-type]
    assert made == {"name": "posterior", "posterior_decay": 0.0, **options}
    with pytest.raises(RoutingError, match="--posterior-decay half: choose cumulative, one-step, or a number from 0 to 1"):
        generate_command(folder, ["a"], posterior_decay="half")


def test_a_folder_of_the_format_before_is_told_apart(folder: Path) -> None:
    change_json(folder / "config.json", format=1)
    with pytest.raises(RoutingError, match="format = 1, this program reads 2; build the ensemble again"):
        load_ensemble(folder)


def test_loaded_experts_are_the_exported_ones(folder: Path, decoders: list[Decoder]) -> None:
    ensemble = load_ensemble(folder)
    tokens, bounds = torch.tensor([1, 50, 60]), torch.tensor([0, 3], dtype=torch.int32)
    for number in range(3):
        loaded = ensemble.decoder(number)
        found, expected = (model.logits(model(tokens, torch.arange(3), bounds)) for model in (loaded, decoders[number]))
        assert torch.allclose(found, expected, atol=1e-5)


def test_experts_load_only_when_asked(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    assert not ensemble._decoders
    assert ensemble.decoder(0) is ensemble.decoder(0)
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


def test_centres_of_several_languages_come_back(parts: Path, tmp_path: Path) -> None:
    save(parts, tmp_path / "one")
    assert load_ensemble(tmp_path / "one").data.centre_experts is None
    save(parts, tmp_path / "several", centre_experts=[1, 0, 2, 0])
    data = load_ensemble(tmp_path / "several").data
    assert data.centre_experts == [1, 0, 2, 0] and data.centres is not None and data.centres.shape[0] == 4
    for wrong in ([0, 1, 2], [0, 1, 1, 0], [0, 1, 2, 3]):
        shutil.rmtree(tmp_path / "several")
        save(parts, tmp_path / "several", centre_experts=wrong)
        with pytest.raises(RoutingError, match=rf"4 centres for {len(set(wrong))} of 3 experts"):
            load_ensemble(tmp_path / "several")


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
        (
            lambda folder: change_json(folder / "config.json", temperature_on="all"),
            "temperature_on = 'all': choose one of mixture, experts",
        ),
        (lambda folder: shutil.rmtree(folder / "experts" / "e1"), "expert e1 is missing"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
        (lambda folder: shutil.rmtree(folder / "router"), "router.json"),
        (lambda folder: (folder / "router" / "router.json").write_text("{}"), "temperature.*missing"),
        (lambda folder: change_json(folder / "router" / "router.json", temperature="warm"), "temperature = 'warm'"),
        (lambda folder: change_json(folder / "router" / "router.json", refresh_tokens=True), "refresh_tokens = True"),
        (lambda folder: change_json(folder / "router" / "router.json", detect_language=1), "detect_language = 1"),
        (lambda folder: change_json(folder / "router" / "router.json", fallback_distance=[1.0]), r"fallback_distance = \[1.0\]"),
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


@pytest.mark.slow
def test_ranks_that_share_the_experts_write_what_one_process_writes(folder: Path) -> None:
    """Experts 0 and 2 on one rank, 1 on the other; greedy and drawn, every kind of router, all ranks alike."""
    settings: list[tuple[str, int | None, str, float]] = [
        ("uniform", None, "mixture", 0.0),
        ("posterior", None, "mixture", 0.0),
        ("posterior", 2, "mixture", 0.9),
        ("tfidf", 2, "mixture", 0.9),
        ("language", 1, "mixture", 0.0),
        ("uniform", None, "logit_mean", 0.0),
    ]
    printed = json.loads(run_ranks("ensemble/shard_ranks.py", 2, str(folder), json.dumps(settings)))
    assert printed["stack"] == 2 and printed["experts"] == 0, "a rank holds its own experts alone"
    ensemble = load_ensemble(folder)
    for router, top_m, combine, temperature in settings:
        options = {"router": router, "top_m": top_m, "combine": combine, "temperature": temperature, "languages": ["en"] * 3}
        alone = generate(ensemble, ["the cat", "кот", ""], max_new_tokens=8, stop_at_eos=False, **options)  # type: ignore[arg-type]
        assert printed["written"][f"{router} {top_m} {combine} {temperature}"] == [result.token_ids for result in alone]


def test_more_ranks_than_experts_are_refused() -> None:
    with pytest.raises(RoutingError, match=r"ensemble.devices = 4: choose 1 to 3"):
        Shards(3, rank=0, ranks=4)


def test_the_mixture_of_ranks_keeps_rare_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given: None)  # the sum over one rank
    given = torch.tensor([-300.0, 0.0, -torch.inf])
    assert torch.equal(Shards(3, rank=0, ranks=1).logsumexp(given.clone()), given)
