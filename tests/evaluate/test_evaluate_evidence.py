"""What docs/results.md is made of: figures of an evaluated run, the rules of the verdicts, and that the page is that of its figures."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from evaluated import evaluate
from tiny_run import REPOSITORY

from benchmarks.evidence.claims import FAILS, HOLDS, OPEN, Claim, judge
from benchmarks.evidence.collect import collect, compact_json
from benchmarks.evidence.plot import digest, draw
from benchmarks.evidence.tables import change, old_languages
from benchmarks.evidence.write import PICTURE, drawn, page
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.recipe import Recipe

RESULTS = REPOSITORY / "benchmarks" / "results" / "evidence"


def interval(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def differences(**languages: float) -> dict[str, Any]:
    rows = {code: interval(value) for code, value in languages.items()}
    found = {"mean": interval(float(np.mean(list(languages.values())))), "gini": interval(0.3), "languages": rows}
    better, worse = ([code for code, row in rows.items() if sign * row["value"] > 0.01] for sign in (-1, 1))
    return found | {"better": better, "worse": worse}


def figures(own: dict[str, float], posterior: float = -0.05) -> dict[str, Any]:
    """A run with one expert a language; `own`: language -> bits per byte of its expert minus those of the dense model."""
    about = {code: {"own": code, "train_tokens": 1000 - place} for place, code in enumerate(own)}
    against = {"own": differences(**own), "mixture:posterior": differences(**dict.fromkeys(own, posterior))}
    return {
        "languages": about,
        "against": {"dense": against, "seed": {"own": {"mean": interval(-0.2)}}},
        "bits": {"seed": {"languages": dict.fromkeys(own, interval(2.0))}},
        "matrix": {expert: {code: 1.8 if code == expert else 2.5 for code in own} for expert in own},
    }


GOOD = {"en": -0.02, "ru": -0.06, "sw": -0.1, "ur": -0.2}


def verdict(words: str, **runs: Any) -> str:
    found: list[Claim] = [claim for claim in judge(runs) if words in claim.text]
    assert len(found) == 1, words
    return found[0].verdict


@pytest.mark.parametrize("sw, expected", [(-0.1, HOLDS), (0.005, OPEN), (0.02, FAILS)])
def test_one_language_decides_whether_all_gain(sw: float, expected: str) -> None:
    assert verdict("beats the dense model in all", **{"typology-8": figures(GOOD | {"sw": sw})}) == expected


@pytest.mark.parametrize("ur, expected", [(-0.2, HOLDS), (-0.005, OPEN), (0.2, FAILS)])
def test_the_poorest_half_decides_whether_only_the_rich_gain(ur: float, expected: str) -> None:
    assert verdict("not only for rich", **{"typology-8": figures(GOOD | {"ur": ur})}) == expected


@pytest.mark.parametrize("random, expected", [(0.02, HOLDS), (-0.055, OPEN), (-0.2, FAILS)])
def test_random_clusters_are_the_control(random: float, expected: str) -> None:
    runs = {"typology-8": figures(GOOD), "random-8": figures(GOOD, random)}
    assert verdict("random clusters as control", **runs) == expected
    assert verdict("at least as good as TF-IDF", **{"typology-8": figures(GOOD), "tfidf-8": figures(GOOD, random)}) == expected


@pytest.mark.parametrize("better, expected", [(-0.05, HOLDS), (0.0, OPEN), (0.05, FAILS)])
def test_rounds_are_compared_with_as_many_experts_branched_at_once(better: float, expected: str) -> None:
    rounds = figures({code: value + better for code, value in GOOD.items()})
    assert verdict("Rounds", **{"typology-8": figures(GOOD), "typology-16": figures(GOOD), "rounds": rounds}) == expected


def test_other_training_seeds_stand_beside_the_first_claim() -> None:
    other = {code: -value for code, value in GOOD.items()}
    (claim, alone) = (
        judge(runs)[0] for runs in ({"typology-8": figures(GOOD), "typology-8-seed1": figures(other)}, {"typology-8": figures(GOOD)})
    )
    assert claim.by == f"{alone.by}; with other training seeds 0 better, {len(GOOD)} worse" and claim.verdict == alone.verdict == HOLDS


@pytest.mark.parametrize("elsewhere, expected", [(2.5, HOLDS), (2.1, FAILS)])
def test_a_wrong_choice_is_weighed_against_a_right_one(elsewhere: float, expected: str) -> None:
    run = figures(GOOD)
    run["matrix"] = {expert: {code: 1.8 if code == expert else elsewhere for code in GOOD} for expert in GOOD}
    assert verdict("wrong choice", **{"typology-8": run}) == expected


def grown(language: float, posterior: float, tfidf: float, *against_lapt: float) -> dict[str, Any]:
    old = {
        f"mixture:{name}": interval(value, 0.001)
        for name, value in zip(("language", "posterior", "tfidf"), (language, posterior, tfidf), strict=True)
    }
    experts = [
        {"languages": [f"x{number}"], "against": {"donor": interval(-1.0), f"lapt:x{number}-lapt-dense": interval(value)}}
        for number, value in enumerate(against_lapt)
    ]
    return {"growth": {"experts": experts, "old_languages": old | {"lapt:x0-lapt-dense": interval(0.7)}}}


@pytest.mark.parametrize(
    "routers, expected",
    [((0.0, 0.0, 0.001), HOLDS), ((0.0, 0.001, 0.05), "holds in part"), ((0.02, 0.02, 0.05), FAILS), ((-0.1, 0.0, 0.0), HOLDS)],
)
def test_old_languages_must_be_as_good_with_every_router(routers: tuple[float, float, float], expected: str) -> None:
    runs = {"typology-8": figures(GOOD), "grown": grown(*routers, -0.1)}
    assert verdict("without forgetting", **runs) == expected


def test_centres_by_language_are_told_and_do_not_decide() -> None:
    runs = {"typology-8": figures(GOOD), "grown": grown(0.0, 0.0, 0.05, -0.1), "grown-centres": grown(0.0, 0.0, 0.002, -0.1)}
    (claim,) = (claim for claim in judge(runs) if "without forgetting" in claim.text)
    assert claim.verdict == "holds in part"
    assert (
        "+0.050** [+0.049, +0.051] with TF-IDF" in claim.by and "(**+0.002** [+0.001, +0.003] with a centre for each language" in claim.by
    )
    uses = {"mixture:tfidf": "TF-IDF router"}
    rows = old_languages(runs["grown"], uses, runs["grown-centres"]).splitlines()
    assert rows[2:4] == [
        "| mixture, TF-IDF router | **+0.050** [+0.049, +0.051] |",
        "| mixture, TF-IDF router, a centre for each language | **+0.002** [+0.001, +0.003] |",
    ]
    assert len(old_languages(runs["grown"], uses).splitlines()) == len(rows) - 1


def test_the_files_are_json_with_an_interval_a_line() -> None:
    value = {"a": [{"value": 1.5, "low": 0.1}, {}, []], "b": {"c": [1, 2]}, "d, {e": "x [y]\n z", "f": None}
    text = compact_json(value)
    assert json.loads(text) == value
    assert '{"value": 1.5, "low": 0.1}' in text and "[1, 2]" in text and text.count("\n") < json.dumps(value, indent=1).count("\n")


@pytest.mark.parametrize(
    "gains, expected", [((-0.1, -0.1), HOLDS), ((-0.1, 0.1), OPEN), ((-0.1, 0.0), OPEN), ((0.1, 0.1, -0.1), FAILS), ((0.0, 0.0), OPEN)]
)
def test_growth_is_judged_by_every_language(gains: tuple[float, ...], expected: str) -> None:
    runs = {"typology-8": figures(GOOD), "grown": grown(0.0, 0.0, 0.0, *gains)}
    assert verdict("(LAPT)", **runs) == expected


@pytest.mark.parametrize("accuracy, expected", [(0.70, HOLDS), (0.51, OPEN), (0.30, FAILS)])
def test_downstream_counts_beyond_two_standard_errors(accuracy: float, expected: str) -> None:
    run = figures(GOOD)
    scores = {"mixture": accuracy, "dense": 0.5}
    run["tasks"] = {
        rung: {"results": {task: {"acc,none": value, "acc_stderr,none": 0.04} for task in ("sw", "vi", "zh")}}
        for rung, value in scores.items()
    }
    assert verdict("downstream", **{"typology-8": run}) == expected


def test_claims_whose_runs_are_missing_are_not_judged() -> None:
    texts = [claim.text for claim in judge({"typology-8": figures(GOOD)})]
    assert not any(words in text for text in texts for words in ("Rounds", "random", "TF-IDF", "LAPT", "downstream"))


def test_changes_have_signs_and_stand_out_beyond_chance() -> None:
    assert change(interval(-0.05)) == "**-0.050** [-0.060, -0.040]"
    assert change(interval(0.005)) == "+0.005 [-0.005, +0.015]"
    assert change(interval(-1e-5, 0.0)) == "**0.000** [0.000, 0.000]"
    assert change({"value": 0.25, "low": None}) == "+0.250"


@pytest.fixture
def evaluated_run(make_run: Callable[..., Path], make_recipe: Callable[..., Recipe]) -> Path:
    run, recipe = make_run(), make_recipe("language")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (run / "clusters" / "report.json").write_text(json.dumps({"names": ["en", "ja", "ru"]}))
    for name in ("dense", "en", "ja", "ru"):
        lines = [
            {"step": 1, "language_tokens": {"en": 1}},
            {"step": 2, "language_tokens": {"en": 40 if name == "dense" else 20}},
            {"saved": 2},
        ]
        (run / "experts" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "experts" / "en" / "choices.json").write_text(json.dumps({"precision": "fp16"}))
    evaluate(run, recipe)
    return run


def test_figures_are_those_of_the_evaluation(evaluated_run: Path, tmp_path: Path) -> None:
    found = collect(evaluated_run, evaluated_run)
    results = json.loads((evaluated_run / "evaluation" / "results.json").read_text())
    assert set(found["bits"]) >= {"seed", "dense", "own", "mixture:posterior"} and not any("expert:" in model for model in found["bits"])
    for row in results["languages"]:
        own = found["bits"]["own"]["languages"][row["code"]]["value"]
        assert own == pytest.approx(results["experts"][row["own"]][row["code"]], rel=1e-5)
        assert found["languages"][row["code"]]["own"] == row["own"]
    dense = found["bits"]["dense"]["mean"]["value"]
    assert found["against"]["dense"]["own"]["mean"]["value"] == pytest.approx(found["bits"]["own"]["mean"]["value"] - dense, abs=1e-4)
    assert found["languages"]["en"]["read"] == {"own": 20, "dense": 40} and found["languages"]["ja"]["read"]["own"] is None
    assert found["settings"]["k"] == 3 and found["settings"]["precision"] == "fp16" and "forgetting" in found and json.dumps(found)
    text = page({"typology-8": found})
    assert "## Verdicts" in text and "| en |" in text and "## New languages" not in text


def test_runs_on_other_documents_are_not_compared(evaluated_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(evaluated_run, other)
    path = other / "evaluation" / "documents.npz"
    documents = DocumentScores.load(path)
    documents.num_bytes["en"] = documents.num_bytes["en"] + 1
    documents.save(path)
    with pytest.raises(SystemExit, match="documents of 'en' are not those of"):
        collect(evaluated_run, other)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results are committed")
def test_the_page_is_what_its_figures_say() -> None:
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    assert (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8") == page(runs)
    changed = copy.deepcopy(runs)
    changed["typology-8"]["against"]["dense"]["own"]["mean"]["value"] += 0.5
    assert page(changed) != page(runs)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results are committed")
def test_the_picture_is_that_of_its_figures() -> None:
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    assert digest(drawn(runs)) in (REPOSITORY / "docs" / PICTURE).read_text(encoding="utf-8")
    changed = copy.deepcopy(runs)
    changed["grown"]["growth"]["experts"][0]["against"]["lapt:az-lapt-dense"]["value"] += 0.5
    assert digest(drawn(changed)) != digest(drawn(runs))


def test_the_picture_draws_what_there_is() -> None:
    alone = {"typology-8": figures(GOOD) | {"settings": {"k": 8}}}
    svg = draw(drawn(alone))
    assert svg == draw(drawn(alone)), "the same bytes for the same figures"
    assert all(f">{label}</text>" in svg for label in (*GOOD, "8 experts", "typology-8", "posterior router")) and "LAPT" not in svg
    with_growth = draw(drawn(alone | {"grown": grown(0.0, 0.0, 0.0, -0.1, 0.1)}))
    assert all(f">{label}</text>" in with_growth for label in ("Grown expert minus LAPT", "of the dense model"))
