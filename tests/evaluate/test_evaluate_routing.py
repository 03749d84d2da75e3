"""Router quality: on weights made by hand, and from a whole evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import evaluate

from megaxelm.ensemble.folder import load_ensemble
from megaxelm.ensemble.routers import Request
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.routing import RouterQuality, add_choices
from megaxelm.evaluate.statistics import Bootstrap
from megaxelm.evaluate.streams import load_streams
from megaxelm.evaluate.subjects import Mixture
from megaxelm.evaluate.summary import statistics_results
from megaxelm.recipe import Recipe

EXPERTS = ["a", "b"]
OWN = {"x": "a", "y": "b"}


def quality_of(weights: dict[str, list[list[list[float]]]], streams: dict[str, list[list[list[float]]]]) -> dict[str, Any]:
    """Figures of a router from weights [tokens][experts] and log-probabilities [experts][tokens] of documents by language."""
    mixture, quality = Mixture("tfidf", None), RouterQuality(EXPERTS, OWN)
    documents = DocumentScores({"seed": {}, "expert:a": {}, "expert:b": {}, mixture.key: {}}, {}, {})
    for language, rows in streams.items():
        mixed = []
        for number, (row, weight) in enumerate(zip(rows, weights[language], strict=True)):
            stream, w = torch.tensor(row), torch.tensor(weight)
            mixed.append((w.T * stream.exp()).sum(0).log())
            quality.hear(mixture, language, number, w, stream, mixed[-1])
        for place, name in enumerate(EXPERTS):
            documents.nats[f"expert:{name}"][language] = np.array([-sum(row[place]) for row in rows])
        documents.nats[mixture.key][language] = np.array([-float(row.double().sum()) for row in mixed])
        documents.nats["seed"][language] = documents.nats["expert:a"][language] + 1.0
        documents.num_bytes[language] = documents.num_tokens[language] = np.array([len(row[0]) for row in rows])
    bootstrap = Bootstrap(add_choices(documents, EXPERTS, OWN), documents.num_bytes, resamples=50)
    found: dict[str, Any] = quality.results(bootstrap, ["seed"])[mixture.column]
    return found


def test_shares_count_documents_and_languages_the_same() -> None:
    good, bad = -0.1, -3.0
    streams = {
        "x": [[[good] * 4, [bad] * 4], [[bad] * 20, [good] * 20]],  # the second document is better predicted by b
        "y": [[[bad] * 2, [good] * 2]],
    }
    weights = {"x": [[[0.9, 0.1]] * 4, [[0.7, 0.3]] * 10 + [[0.2, 0.8]] * 10], "y": [[[0.55, 0.45], [0.0, 1.0]]]}
    found = quality_of(weights, streams)
    # x: (1 + 1/2) / 2 own, (1 + 1/2) / 2 best; y: 1/2 and 1/2
    assert found["languages"]["x"]["accuracy_own"] == pytest.approx(0.75)
    assert found["accuracy_own"] == found["accuracy_best"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["weight_on_best"] == pytest.approx(((0.9 + 0.55) / 2 + 0.725) / 2)
    assert found["weight_on_own"] == pytest.approx(((0.9 + 0.45) / 2 + 0.725) / 2)
    # bins by the heaviest weight; a document's tokens share its weight
    bins = {round(row["from"], 1): row for row in found["calibration"]["bins"] if row["share"]}
    assert {begin: row["share"] for begin, row in bins.items()} == pytest.approx({0.5: 1 / 4, 0.7: 1 / 8, 0.8: 1 / 8, 0.9: 1 / 2})
    assert bins[0.9]["frequency"] == pytest.approx(1.0) and bins[0.9]["weight"] == pytest.approx(0.95)
    assert (bins[0.5]["frequency"], bins[0.7]["frequency"], bins[0.8]["frequency"]) == (0, 0, 1)
    assert found["calibration"]["ece"] == pytest.approx(0.55 / 4 + 0.7 / 8 + 0.2 / 8 + 0.05 / 2)
    # bands: document two of x alone reaches behind token 16, where it is right
    first, second, third, _ = found["by_position"]
    assert (first["from"], first["to"], first["tokens"]) == (0, 16, 22) and (second["from"], second["to"], second["tokens"]) == (16, 64, 4)
    assert second["accuracy_best"] == 1 and second["accuracy_own"] == 0 and third["tokens"] == 0 and third["accuracy_best"] is None
    assert first["accuracy_best"] == pytest.approx(((1 + 6 / 16) / 2 + 0.5) / 2)
    expected = (good - math.log(0.8 * math.exp(good) + 0.2 * math.exp(bad))) / math.log(2)
    assert second["regret_bits_per_token"] == pytest.approx(expected, rel=1e-5)


def test_regret_is_against_each_choice() -> None:
    streams = {"x": [[[-1.0, -1.0], [-2.0, -2.0]], [[-4.0], [-1.5]]], "y": [[[-1.0], [-3.0]], [[-1.0], [-3.0]]]}
    weights = {"x": [[[1.0, 0.0]] * 2, [[1.0, 0.0]]], "y": [[[0.0, 1.0]]] * 2}
    regret = {name: row["value"] * math.log(2) for name, row in quality_of(weights, streams)["regret"].items()}
    # nats over 3 bytes of x and 2 of y: the router has 6 and 6; own 6 and 6; best of language 5.5 (b) and 2; of document 3.5 and 2
    assert regret == pytest.approx(
        {
            "own": 0.0,
            "best-of-language": (0.5 / 3 + 4 / 2) / 2,
            "best-of-document": (2.5 / 3 + 4 / 2) / 2,
            "seed": (-2 / 3 + 2 / 2) / 2,
        }
    )


def test_models_that_read_other_languages_are_compared_where_they_can_be() -> None:
    sizes = {code: np.array([8, 9, 7]) for code in ("x", "y")}
    seed = {code: np.array([5.0, 6.0, 5.5]) for code in sizes}
    nats = {"seed": seed, "own": {code: row - 1 for code, row in seed.items()}, "lapt:n": {"y": seed["y"] - 2}, "lapt:z": {}}
    columns = {"seed": "seed", "own": "own", "lapt:n": "lapt:n", "lapt:z": "lapt:z"}
    found = statistics_results(Bootstrap(nats, sizes, resamples=50), columns)
    rows = {(row["model"], row["base"]): row for row in found["differences"]}
    assert set(rows) == {("own", "seed"), ("lapt:n", "seed"), ("lapt:n", "own")} and "lapt:z" not in found["models"]
    assert rows["lapt:n", "own"]["mean"]["value"] == pytest.approx(-3 / math.log(2) / 24) and list(rows["lapt:n", "own"]["languages"]) == [
        "y"
    ]
    noisy = nats | {"noisy": {code: row + np.array([1.0, -1.0, 0.2]) for code, row in seed.items()}}
    (row,) = statistics_results(Bootstrap(noisy, sizes, resamples=200), {"seed": "seed", "noisy": "noisy"})["differences"]
    assert (row["better"], row["worse"], row["unclear"]) == ([], [], ["x", "y"]) and row["mean"]["value"] > 0
    assert rows["lapt:n", "own"]["better"] == ["y"] and rows["own", "seed"]["unclear"] == []
    without = statistics_results(Bootstrap(nats, sizes, resamples=50), columns, {"y"})
    assert {(row["model"], row["base"]): list(row["languages"]) for row in without["differences"]} == {("own", "seed"): ["x"]}
    assert without["models"]["seed"]["mean"] == found["models"]["seed"]["languages"]["x"] != found["models"]["seed"]["mean"]


def test_the_evaluation_reports_every_router(make_run: Callable[..., Path], make_recipe: Callable[..., Recipe]) -> None:
    run = make_run("language")
    sections = {"ensemble": {"fallback": "dense"}, "evaluation": {"routers": ["language", "posterior", "uniform"], "top_m": [1]}}
    recipe = make_recipe("language", **sections)
    results = evaluate(run, recipe)
    assert set(results["routers"]) == {f"mixture-{name}{m}" for name in ("language", "posterior", "uniform") for m in ("", "@1")}
    told = results["routers"]["mixture-language"]
    assert told["accuracy_own"] == told["weight_on_own"] == 1 and told["regret"]["own"]["value"] == pytest.approx(0, abs=1e-9)
    own, seed = (results["models"][key]["mean_bits_per_byte"] for key in ("own", "seed"))
    assert told["regret"]["seed"]["value"] == pytest.approx(own - seed)

    # equal weights are right once in three
    assert results["routers"]["mixture-uniform"]["accuracy_own"] == pytest.approx(1 / 3)

    # the posterior's figures again, from what was stored
    streams, ensemble = load_streams(run / "evaluation" / "streams.npz"), load_ensemble(run / "ensemble")
    assert streams.experts[-1] == "dense"
    shares = []
    for language, item in streams.held_out.items():
        hits = []
        for ids, rows in zip(item.ids, streams.logprobs[language], strict=True):
            weights = ensemble.router("posterior").along(Request((), language), ids, rows)
            heaviest = (weights == weights.amax(-1, keepdim=True)).double()
            hits.append(float((heaviest / heaviest.sum(-1, keepdim=True))[:, rows.double().sum(-1).argmax()].mean()))
        shares.append(sum(hits) / len(hits))
    assert results["routers"]["mixture-posterior"]["accuracy_best"] == pytest.approx(sum(shares) / len(shares))
    assert results["statistics"]["models"]["own"]["mean"]["value"] == pytest.approx(own)
    pairs = [(row["model"], row["base"]) for row in results["statistics"]["differences"]]
    assert pairs[:3] == [("dense", "seed"), ("own", "seed"), ("own", "dense")] and ("mixture-uniform", "own") in pairs
    row = results["statistics"]["differences"][2]
    assert sorted(row["better"] + row["worse"] + row["unclear"]) == ["en", "ja", "ru"]
    assert row["worst"]["value"] == max(found["value"] for found in row["languages"].values())
    assert row["languages"][row["worst"]["language"]]["value"] == row["worst"]["value"]
    assert row["mean"]["value"] == pytest.approx(own - results["models"]["dense"]["mean_bits_per_byte"])
