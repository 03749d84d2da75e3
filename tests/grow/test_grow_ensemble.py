"""The ensemble and the evaluation before growing, after it, and after dropping: what is old stays bit for bit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import drop_in, grow_in

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.ensemble.centres import mean_centres, sample_documents
from megaxelm.ensemble.folder import load_ensemble
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.stage import build_ensemble
from megaxelm.errors import GrowError, RoutingError, StageError
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.files import read_json
from megaxelm.grow.study import sample_texts, space_notes
from megaxelm.growth import Growth, read_growth, write_growth
from megaxelm.run import RunFolder
from megaxelm.stages import Stages


def files_of(folder: Path) -> dict[str, str]:
    """Hash of every file but the marker, by its place."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "stage.json"
    }


def results_of(run: Path) -> dict[str, Any]:
    return read_json(run / "evaluation" / "results.json")


def scores_of(run: Path) -> DocumentScores:
    return DocumentScores.load(run / "evaluation" / "documents.npz")


def test_runs_that_never_grew_are_made_from_what_they_were(trained_run: Path) -> None:
    folder = RunFolder(trained_run)
    stages = Stages(folder, folder.recipe(), check_sources=False)
    ensemble, evaluation = (stages.units(stage)[stage] for stage in ("ensemble", "evaluation"))
    assert set(ensemble.settings) == {"version", "ensemble", "tfidf", "seed"}
    assert set(ensemble.inputs) == {"clusters", "index", "experts/bg-en", "experts/de-ru"}
    assert set(evaluation.settings) == {"version", "evaluation", "sequence_length"}
    assert set(evaluation.inputs) == {"corpus", "ensemble", *(f"experts/{name}" for name in ("seed", "dense", "bg-en", "de-ru"))}


def test_the_evaluation_is_made_from_the_comparisons_and_the_ensemble_is_not(grown_run: Path) -> None:
    folder = RunFolder(grown_run)
    stages = Stages(folder, folder.recipe(), check_sources=False)
    ensemble, evaluation = (stages.units(stage)[stage] for stage in ("ensemble", "evaluation"))
    assert {name for name in ensemble.inputs if name.startswith("grown/")} == {"grown/az"}
    assert {name for name in evaluation.inputs if name.startswith("grown/")} == {"grown/az-lapt-dense", "grown/az-lapt-seed"}
    before = stages.made_from("ensemble").fingerprint
    marker = grown_run / "grown" / "az" / "experts" / "az" / "stage.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"weights": "others"}))
    assert stages.made_from("ensemble").fingerprint != before


def test_new_experts_stand_behind_the_old_ones_and_old_centres_are_bit_equal(_trained_run: Path, grown_run: Path) -> None:
    before, after = load_ensemble(_trained_run / "ensemble"), load_ensemble(grown_run / "ensemble")
    assert before.experts == ["bg-en", "de-ru"] and after.experts == ["bg-en", "de-ru", "az"]
    assert before.data.centres is not None and after.data.centres is not None
    assert torch.equal(after.data.centres[:2], before.data.centres)
    assert files_of(_trained_run / "ensemble" / "router").keys() == files_of(grown_run / "ensemble" / "router").keys()
    for name in ("space.json", "space.safetensors"):
        assert (_trained_run / "ensemble" / "router" / name).read_bytes() == (grown_run / "ensemble" / "router" / name).read_bytes()
    for name in before.experts:
        assert files_of(_trained_run / "ensemble" / "experts" / name) == files_of(grown_run / "ensemble" / "experts" / name)
    assert after.data.language_expert == {**before.data.language_expert, "az": "az"}
    assert set(after.languages["az"]) == {"az"} and after.languages["az"]["az"] > 0


def test_the_new_centre_is_the_mean_of_the_languages_sample_in_the_runs_own_space(grown_run: Path) -> None:
    data = load_ensemble(grown_run / "ensemble").data
    documents = sample_documents(grown_run / "grown" / "az" / "corpus", 80, ["az"])
    assert documents and {document.language for document in documents} == {"az"}
    vectors = data.space.transform([document.text for document in documents])
    assert data.centres is not None
    assert torch.allclose(data.centres[2].double(), torch.nn.functional.normalize(torch.tensor(vectors).double().mean(0), dim=0), atol=1e-6)
    router = load_ensemble(grown_run / "ensemble").router("tfidf")
    tokenizer = load_ensemble(grown_run / "ensemble").tokenizer
    text = (grown_run / "grown" / "az" / "corpus" / "valid" / "az.jsonl").read_text(encoding="utf-8").splitlines()[0]
    ids = tokenizer.encode([json.loads(text)["text"]])[0]
    assert int(router.weights(router.start([Request(ids)])).argmax()) == 2


def test_a_fallback_stands_behind_grown_experts_and_trusts_as_before(grown_run: Path, tmp_path: Path) -> None:
    recipe = RunFolder(grown_run).recipe()
    with_seed = recipe.model_copy(update={"ensemble": recipe.ensemble.model_copy(update={"fallback": "seed"})})
    build_ensemble(with_seed, grown_run, tmp_path / "grown")
    (grown_run / "growth.json").unlink()
    build_ensemble(with_seed, grown_run, tmp_path / "before")
    grown, before = load_ensemble(tmp_path / "grown"), load_ensemble(tmp_path / "before")
    assert grown.experts == ["bg-en", "de-ru", "az", "seed"] and grown.trained == ["bg-en", "de-ru", "az"]
    assert grown.data.fallback_distance == before.data.fallback_distance


def test_the_prior_by_tokens_counts_the_new_language_and_not_its_replay(grown_run: Path, tmp_path: Path) -> None:
    recipe = RunFolder(grown_run).recipe()
    build_ensemble(
        recipe.model_copy(update={"ensemble": recipe.ensemble.model_copy(update={"posterior_prior": "tokens"})}), grown_run, tmp_path / "e"
    )
    prior = load_ensemble(tmp_path / "e").data.posterior_prior
    tokens = read_json(grown_run / "grown" / "az" / "index" / "manifest.json")["clusters"]["az"]["az"]["tokens"]
    assert prior is not None and prior[2] == tokens


def test_old_scores_are_bit_equal_where_no_weight_is_new(_trained_run: Path, grown_run: Path) -> None:
    before, after = scores_of(_trained_run), scores_of(grown_run)
    for key in ("seed", "dense", "expert:bg-en", "expert:de-ru", "mixture:language"):
        for language in before.languages:
            assert before.nats[key][language].tolist() == after.nats[key][language].tolist()


def test_new_languages_experts_and_comparisons_are_evaluated(grown_run: Path) -> None:
    results, scores = results_of(grown_run), scores_of(grown_run)
    assert [row["code"] for row in results["languages"]] == ["az", "bg", "de", "en", "ru"]
    assert results["languages"][0]["own"] == "az"
    valid = (grown_run / "grown" / "az" / "corpus" / "valid" / "az.jsonl").read_text(encoding="utf-8").splitlines()
    assert results["languages"][0]["documents"] == min(4, len(valid))
    assert {"expert:az", "lapt:az-lapt-dense", "lapt:az-lapt-seed"} <= set(scores.nats)
    assert set(results["experts"]) == {"bg-en", "de-ru", "az"}
    assert results["models"]["own"]["languages"]["az"]["bits_per_byte"] == results["experts"]["az"]["az"]
    assert set(results["models"]["lapt:az-lapt-dense"]["languages"]) == {"az", "bg", "de", "en", "ru"}
    assert "az" not in [*results["verdict"]["beaten"], *results["verdict"]["not_beaten"]]
    assert [row["code"] for row in results["languages"] if row.get("grown")] == ["az"]
    for model in results["models"].values():  # the old models never read it: no mean counts it
        counted = {code: found["bits_per_byte"] for code, found in model["languages"].items() if code != "az"}
        assert model["mean_bits_per_byte"] == pytest.approx(sum(counted.values()) / 4)
        assert model["worst_language"] == max(counted, key=lambda code: counted[code])
    assert all("az" not in row["languages"] and len(row["languages"]) == 4 for row in results["statistics"]["differences"])
    assert "never read az" in results["forgetting"]["notes"][0]
    ensemble = read_json(grown_run / "ensemble" / "config.json")
    assert not any("lapt" in entry["name"] for entry in ensemble["experts"])


def test_dropping_what_was_grown_gives_the_ensemble_and_the_scores_of_before(_trained_run: Path, grown_run: Path) -> None:
    said = drop_in(grown_run, "az")
    assert files_of(grown_run / "ensemble") == files_of(_trained_run / "ensemble")
    before, after = scores_of(_trained_run), scores_of(grown_run)
    assert set(after.nats) == set(before.nats)
    for key, found in before.nats.items():
        assert {code: values.tolist() for code, values in found.items()} == {
            code: values.tolist() for code, values in after.nats[key].items()
        }
    assert (grown_run / "grown" / "az" / "experts" / "az" / "export" / "config.json").is_file()
    assert any("--languages az --undo" in line and "grown/az" in line for line in said)


def test_undo_brings_everything_back(grown_run: Path) -> None:
    growth, ensemble, results = read_growth(grown_run), files_of(grown_run / "ensemble"), results_of(grown_run)
    drop_in(grown_run, "az")
    assert read_growth(grown_run).dropped_languages == ("az",) and read_growth(grown_run).dropped_experts == ("az",)
    drop_in(grown_run, "az", undo=True)
    assert read_growth(grown_run) == growth and files_of(grown_run / "ensemble") == ensemble and results_of(grown_run) == results


def test_an_expert_that_keeps_a_language_stays_and_the_user_is_told(_trained_run: Path, trained_run: Path) -> None:
    said = drop_in(trained_run, "de")
    ensemble = load_ensemble(trained_run / "ensemble")
    assert ensemble.experts == ["bg-en", "de-ru"] and "de" not in ensemble.data.language_expert
    assert "de" not in ensemble.languages["de-ru"]
    assert any("`de-ru` stays for ru" in line and "still in its weights" in line for line in said)
    before, after = scores_of(_trained_run), scores_of(trained_run)
    assert after.languages == ["bg", "en", "ru"]
    for key in before.nats:
        assert all(before.nats[key][code].tolist() == after.nats[key][code].tolist() for code in after.languages)
    with pytest.raises(RoutingError, match="no expert for the language 'de'"):
        ensemble.router("language").start([Request((5,), "de")])
    drop_in(trained_run, "ru")
    assert load_ensemble(trained_run / "ensemble").experts == ["bg-en"]


def test_an_expert_by_name_takes_its_languages_along_and_leaves_the_weights_of_the_others(grown_run: Path) -> None:
    before = load_ensemble(grown_run / "ensemble")
    drop_in(grown_run, experts="bg-en")
    after = load_ensemble(grown_run / "ensemble")
    assert after.experts == ["de-ru", "az"] and set(after.data.language_expert) == {"de", "ru", "az"}
    assert before.data.centres is not None and after.data.centres is not None
    assert torch.equal(after.data.centres, before.data.centres[1:])
    assert read_growth(grown_run).dropped_languages == ("bg", "en")
    assert [row["code"] for row in results_of(grown_run)["languages"]] == ["az", "de", "ru"]
    drop_in(grown_run, "en", undo=True)
    assert load_ensemble(grown_run / "ensemble").experts == ["bg-en", "de-ru", "az"]
    assert read_growth(grown_run).dropped_languages == ("bg",)


def test_a_language_of_a_dropped_expert_goes_to_another_that_has_its_text(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaxelm.cluster import load

    load_partitioner = load.load_partitioner

    def by_document(*given: Any) -> Any:
        partitioner = load_partitioner(*given)
        partitioner.languages = lambda: None  # type: ignore[method-assign]
        return partitioner

    monkeypatch.setattr(load, "load_partitioner", by_document)
    manifest = trained_run / "index" / "manifest.json"
    index = read_json(manifest)
    index["clusters"]["de-ru"]["en"] = dict.fromkeys(("documents", "tokens", "bytes"), 1)
    manifest.write_text(json.dumps(index))
    write_growth(trained_run, Growth((), ("bg",), ("bg-en",)))
    build_ensemble(RunFolder(trained_run).recipe(), trained_run, tmp_path / "e")
    ensemble = load_ensemble(tmp_path / "e")
    assert ensemble.experts == ["de-ru"]
    assert ensemble.data.language_expert == {"de": "de-ru", "en": "de-ru", "ru": "de-ru"}


def test_comparisons_leave_with_their_language_or_by_name(grown_run: Path) -> None:
    drop_in(grown_run, experts="az-lapt-seed")
    assert {key for key in scores_of(grown_run).nats if key.startswith("lapt")} == {"lapt:az-lapt-dense"}
    assert [row["code"] for row in results_of(grown_run)["languages"]] == ["az", "bg", "de", "en", "ru"]


@pytest.mark.parametrize(
    ("words", "languages", "experts", "undo"),
    [
        ("no expert holds it; the languages of this run are az, bg, de, en, ru", "fr", "", False),
        ("--experts fr: this run has bg-en, de-ru, az", "", "fr", False),
        ("the language az is not dropped", "az", "", True),
        ("the expert az is not dropped", "", "az", True),
        ("nothing would be left", "az bg de en ru", "", False),
        ("give --languages or --experts", "", "", False),
        ("give --languages or --experts", "az", "az", False),
    ],
)
def test_mistakes_of_dropping_change_nothing(grown_run: Path, words: str, languages: str, experts: str, undo: bool) -> None:
    before = (grown_run / "growth.json").read_bytes()
    with pytest.raises(GrowError, match=words):
        drop_in(grown_run, languages, experts, undo)
    assert (grown_run / "growth.json").read_bytes() == before


def test_dropping_twice_is_a_mistake(grown_run: Path) -> None:
    drop_in(grown_run, "az")
    with pytest.raises(GrowError, match="az: dropped already; --undo brings it back"):
        drop_in(grown_run, "az")
    with pytest.raises(GrowError, match="az: dropped already"):
        drop_in(grown_run, experts="az")


def test_what_the_recipe_asks_of_the_ensemble_goes_before(trained_run: Path) -> None:
    from megaxelm.grow.drop import drop

    folder = RunFolder(trained_run)
    recipe = folder.recipe()
    recipe = recipe.model_copy(update={"ensemble": recipe.ensemble.model_copy(update={"top_m": 2})})
    Stages(folder, recipe, say=lambda text: None, check_sources=False).make_one("ensemble")
    with pytest.raises(RoutingError, match="top_m = 2"):
        drop(folder, recipe, experts=["bg-en"], say=lambda text: None)
    assert not (trained_run / "growth.json").exists()
    assert load_ensemble(trained_run / "ensemble").experts == ["bg-en", "de-ru"]


def test_an_unfinished_child_is_told(grown_run: Path) -> None:
    (grown_run / "grown" / "az" / "experts" / "az" / "stage.json").unlink()
    folder = RunFolder(grown_run)
    with pytest.raises(StageError, match="grown/az is not finished; go on with it: megaxelm grow"):
        Stages(folder, folder.recipe(), check_sources=False).make_one("ensemble")


def test_a_language_without_a_known_term_is_refused_before_training(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm.cluster.space import TfidfSpace

    transform = TfidfSpace.transform
    monkeypatch.setattr(TfidfSpace, "transform", lambda self, texts: transform(self, texts) * 0)
    with pytest.raises(GrowError, match="the vector space of the router tfidf knows no term"):
        grow_in(trained_run, "az")
    assert not list(trained_run.glob("grown/*/experts"))


def test_languages_that_the_tfidf_router_will_lose_are_told(_trained_run: Path, grown_run: Path) -> None:
    tokenizer, known = Tokenizer.load(_trained_run / "tokenizer"), ["bg", "de", "en", "ru"]
    # A centre of German alone lies nearer to German than that of the expert, who has Russian too.
    german = sample_texts(_trained_run / "corpus", "de", 200)
    (note,) = space_notes(_trained_run, "new", tokenizer, {"xx": german}, known)
    assert re.match(r"the router tfidf will take (9\d|100)% of de for xx, since", note)
    both = [*german, *sample_texts(_trained_run / "corpus", "en", 200)]
    (note,) = space_notes(_trained_run, "new", tokenizer, {"xx": both}, ["ru", "en", "de"])
    assert re.search(r"\d% of (de|en), \d+% of (de|en) for xx", note) and "ru" not in note.partition("since")[0].replace("router", "")
    assert space_notes(_trained_run, "new", tokenizer, {"xx": german}, ["ru", "bg"]) == []
    # The new expert itself, once it is there, is none that it takes from.
    as_grown = space_notes(grown_run, "az", tokenizer, {"az": german}, known)
    assert as_grown == space_notes(_trained_run, "az", tokenizer, {"az": german}, known) != []


def test_with_a_centre_for_each_language_fewer_texts_go_astray(_trained_run: Path, grown_run: Path) -> None:
    tokenizer, known = Tokenizer.load(_trained_run / "tokenizer"), ["bg", "de", "en", "ru"]
    recipe = RunFolder(grown_run).recipe()
    by_language = recipe.model_copy(update={"ensemble": recipe.ensemble.model_copy(update={"centres": "language"})})
    shares = {}
    for name, found in (("cluster", recipe), ("language", by_language)):
        build_ensemble(found, grown_run, grown_run / name)
        ensemble = load_ensemble(grown_run / name)
        router = ensemble.router("tfidf")
        right = []
        for code in [*known, "az"]:
            folder = grown_run / "grown" / "az" if code == "az" else grown_run
            for text in sample_texts(folder / "corpus", code, 30):
                weights = router.weights(router.start([Request(tokenizer.encode([text])[0])]))[0]
                right.append(ensemble.experts[int(weights.argmax())] == ensemble.data.language_expert[code])
        shares[name] = sum(right) / len(right)
    data = load_ensemble(grown_run / "language").data
    assert data.centre_experts == [0, 0, 1, 1, 2] and data.centres is not None and data.centres.shape[0] == 5
    assert shares["language"] > 0.9 and shares["cluster"] < 0.8, shares
    shutil.rmtree(grown_run / "ensemble")
    (grown_run / "language").rename(grown_run / "ensemble")
    texts = sample_texts(grown_run / "grown" / "az" / "corpus", "az", 200)
    (now,), (before,) = (space_notes(run, "az", tokenizer, {"az": texts}, known) for run in (grown_run, _trained_run))
    # The way out is named where it is not taken yet.
    assert "ensemble.centres = language" in before and "ensemble.centres" not in now
    lost, at_first = (re.search(r"(\d+)% of de\b", note) for note in (now, before))
    assert lost and at_first and int(lost[1]) < 40 and int(at_first[1]) > 80
    german = sample_texts(grown_run / "corpus", "de", 200)[:5]
    with pytest.raises(GrowError, match="^yy: the vector space"):
        space_notes(grown_run, "new", tokenizer, {"xx": german, "yy": [""]}, known)


def test_mean_centres_name_the_expert(grown_run: Path) -> None:
    import numpy as np

    with pytest.raises(RoutingError, match="expert az has no document with known terms"):
        mean_centres(np.zeros((2, 3)), np.zeros(2, np.int64), ["az"])
