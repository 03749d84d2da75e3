"""Router fitting: what is fitted is least, halves stay apart, and what is written comes into force."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import evaluate

from megaxelm.ensemble.folder import load_ensemble
from megaxelm.errors import MegaxelmError
from megaxelm.evaluate import fit as fit_module
from megaxelm.evaluate.fit import choose_top_m, fit_prior, fit_run, prior_loss
from megaxelm.evaluate.fit_data import Half, asked_at, distances_of, evidence_of, mixture_nats, read_halves, table_of
from megaxelm.evaluate.fit_write import fit_text, fitted_fields, write_fit
from megaxelm.evaluate.perplexity import HeldOut
from megaxelm.evaluate.statistics import bits_per_byte
from megaxelm.recipe import Recipe, dump_recipe
from megaxelm.run import RunFolder

FALLBACK = {"ensemble": {"fallback": "dense", "router": "tfidf"}}


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe], run_writer: Callable[[Path, str], None]
) -> Path:
    """An evaluated run with a fallback expert, four documents a language."""
    run = tmp_path_factory.mktemp("fit") / "run"
    run_writer(run, "language")
    recipe = make_recipe("language", **FALLBACK)
    evaluate(run, recipe)
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return run


def mean_bits(half: Half, nats: dict[str, np.ndarray]) -> float:
    return float(np.mean([bits_per_byte(nats[code], item.num_bytes) for code, item in half.held_out.items()]))


def test_the_table_gives_the_bits_of_the_routers_as_they_are_used(evaluated: Path) -> None:
    ensemble = load_ensemble(evaluated / "ensemble")
    half, other = read_halves(evaluated, ensemble)
    assert all(len(item.ids) == 2 for item in (*half.held_out.values(), *other.held_out.values()))
    assert half.held_out["ru"].ids[1] != other.held_out["ru"].ids[1] and half.held_out["ru"].ids[0] != other.held_out["ru"].ids[0]
    table = table_of(half)
    for refresh, size in (("token", 64), ("chunk", 5), ("frozen", 7)):
        rows = asked_at(half, refresh, size)
        for decay in (1.0, 0.9, 0.0):
            router = ensemble.router("posterior", posterior_decay=decay, refresh=refresh, refresh_tokens=size)
            log_w = (evidence_of(half, decay)[rows] + ensemble.router("posterior").log_prior).log_softmax(-1)  # type: ignore[attr-defined]
            assert table.bits(log_w) == pytest.approx(mean_bits(half, mixture_nats(half, router, None)), rel=1e-9)
        router = ensemble.router("tfidf", refresh=refresh, refresh_tokens=size)
        plain: Any = ensemble.router("tfidf")
        distance, known = (each[rows] for each in distances_of(half, plain))
        log_w = plain.keep(plain.of_distances(distance, known), None).dense(plain.num_experts)
        assert table.bits(log_w) == pytest.approx(mean_bits(half, mixture_nats(half, router, None)), rel=1e-9)


def test_no_other_temperature_or_fallback_weight_is_better(evaluated: Path) -> None:
    found = fit_run(evaluated)
    ensemble = load_ensemble(evaluated / "ensemble")
    half, other = read_halves(evaluated, ensemble)
    row = found["routers"]["tfidf"]
    fitted = row["fitted"]
    assert set(fitted) == {"temperature", "distance_power", "fallback_weight"} and found["router"] == "tfidf"

    def bits(**settings: Any) -> float:
        return mean_bits(half, mixture_nats(half, ensemble.router("tfidf", **settings), None))

    best = bits(**fitted)
    assert row["fit_half"]["fitted"] == pytest.approx(best, abs=1e-4) and best <= row["fit_half"]["today"] + 1e-9
    assert row["fit_half"]["today"] == pytest.approx(bits())
    for power in (2, 4):
        for temperature in (0.003, 0.03, 0.1, 0.3, 1.0, 10.0):
            for weight in (0.001, 0.05, 0.4):
                assert best <= bits(temperature=temperature, distance_power=power, fallback_weight=weight) + 1e-4
    # judged on the other half, paired with today's settings
    before = mixture_nats(other, ensemble.router("tfidf"), None)
    after = mixture_nats(other, ensemble.router("tfidf", **fitted), None)
    judged = row["other_half"]
    assert judged["difference"]["value"] == pytest.approx(mean_bits(other, after) - mean_bits(other, before))
    assert judged["today"]["value"] == pytest.approx(mean_bits(other, before)) and judged["difference"]["low"] is not None
    # the fallback's weight is shared: the posterior was fitted beside that of the main router
    assert found["routers"]["posterior"]["fitted"]["fallback_weight"] == pytest.approx(fitted["fallback_weight"], rel=1e-6)


def documents(seed: int = 0) -> Half:
    """Documents of two languages: three experts, of which the second is best for x and the third for most of y."""
    draw = np.random.default_rng(seed)
    held_out, logprobs = {}, {}
    for code, count, good in (("x", 12, [1] * 12), ("y", 9, [2] * 7 + [0] * 2)):
        rows = []
        for number in range(count):
            row = draw.normal(-2.0, 0.8, (3, 6))
            row[good[number]] += 1.0
            rows.append(torch.from_numpy(row).float())
        logprobs[code] = rows
        held_out[code] = HeldOut(code, [[0] * 6] * count, [20] * count)
    return Half(held_out, logprobs)


def test_the_prior_is_the_one_that_em_finds() -> None:
    half = documents()
    table = table_of(half)
    value, prior, weight = fit_prior(table, evidence_of(half, 1.0), None, False)
    # EM of a mixture of documents; a document counts by the share of its language
    nats = {code: np.stack([row.double().sum(1).numpy() for row in rows]) for code, rows in half.logprobs.items()}
    found = np.full(3, 1 / 3)
    for _ in range(3000):
        new = np.zeros(3)
        for rows in nats.values():
            after = np.exp(np.log(found) + rows - np.logaddexp.reduce(np.log(found) + rows, axis=1, keepdims=True))
            new += after.sum(0) / len(rows)
        found = new / new.sum()
    assert prior == pytest.approx(found, abs=2e-3) and prior.sum() == pytest.approx(1) and weight == 0
    bits = np.mean([-np.logaddexp.reduce(np.log(found) + rows, axis=1).sum() / (len(rows) * 20) for rows in nats.values()]) / math.log(2)
    assert value == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize(("free", "decay"), [(True, 1.0), (True, 0.5), (False, 0.5)])
def test_the_gradient_of_prior_and_fallback_leads_to_the_least(free: bool, decay: float) -> None:
    half = documents(1)
    table, evidence = table_of(half), evidence_of(half, decay)
    value, prior, weight = fit_prior(table, evidence, 0.05, free)
    assert (weight == pytest.approx(0.05)) == (not free)

    def bits(two: np.ndarray, share: float) -> float:
        given = torch.log(torch.from_numpy(np.append(two * (1 - share), share)))
        return table.bits((given + evidence).log_softmax(-1))

    assert bits(prior, weight) == pytest.approx(value)
    for step in (-0.02, 0.02):
        assert value <= bits(np.array([prior[0] + step, prior[1] - step]), weight) + 1e-9
        if free and 1e-3 < weight < 0.44:
            assert value <= bits(prior, weight + step / 4) + 1e-9


@pytest.mark.parametrize(("weight", "free"), [(None, False), (0.2, False), (0.2, True)])
def test_the_gradient_is_that_of_the_loss(weight: float | None, free: bool) -> None:
    half = documents(2)
    table, evidence = table_of(half), evidence_of(half, 0.8)
    x = np.array([0.5, -0.3, 0.2])[: 3 - (weight is not None and not free)]
    gradient = prior_loss(x, table, evidence, weight, free)[1]
    steps = [step for step in 1e-5 * np.eye(len(x))]
    slopes = [
        (prior_loss(x + step, table, evidence, weight, free)[0] - prior_loss(x - step, table, evidence, weight, free)[0]) / 2e-5
        for step in steps
    ]
    assert gradient == pytest.approx(np.array(slopes), abs=1e-8) and np.abs(gradient).max() > 1e-4


def test_no_expert_is_written_off() -> None:
    rows = torch.tensor([[0.0] * 4, [-50.0] * 4])
    half = Half({"x": HeldOut("x", [[0] * 4], [8])}, {"x": [rows]})
    _, prior, _ = fit_prior(table_of(half), evidence_of(half, 1.0), None, False)
    assert 1e-4 < prior[1] < 1e-2


def test_the_fewest_experts_within_the_tolerance_are_kept(evaluated: Path) -> None:
    ensemble = load_ensemble(evaluated / "ensemble")
    half, _ = read_halves(evaluated, ensemble)
    fit = fit_module.Fit("posterior", 0.0, {})
    found = choose_top_m(ensemble, half, fit, 0.0)
    for m, bits in found["bits"].items():
        assert bits == pytest.approx(mean_bits(half, mixture_nats(half, ensemble.router("posterior"), m)), rel=1e-9)
    order = sorted(found["bits"], key=lambda m: found["bits"][m])
    assert (found["chosen"] or 3) == order[0]
    assert choose_top_m(ensemble, half, fit, 1e9)["chosen"] == 1
    assert choose_top_m(ensemble, half, fit_module.Fit("language", 0.0, {}), 0.0)["chosen"] == 1


def test_what_judges_has_no_part_in_the_fit(evaluated: Path, tmp_path: Path) -> None:
    first = fit_run(evaluated)
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    path = run / "evaluation" / "streams.npz"
    arrays = dict(np.load(path))
    for language in ("en", "ja", "ru"):
        begins = np.append(0, np.cumsum(arrays[f"lengths|{language}"]))
        for number in (1, 3):
            part = arrays[f"logprobs|{language}"][:, begins[number] : begins[number + 1]]
            part[:] = part[::-1] - 1.0
    np.savez(path, **arrays)
    second = fit_run(run)
    assert second["recipe"] == first["recipe"]
    assert second["routers"]["tfidf"]["fit_half"] == first["routers"]["tfidf"]["fit_half"]
    assert second["routers"]["tfidf"]["other_half"]["today"] != first["routers"]["tfidf"]["other_half"]["today"]


def test_what_is_written_is_a_recipe_and_the_evaluation_tells(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    before = RunFolder(run).recipe()
    found = fit_run(run)
    text = fit_text(found)
    assert "router posterior:" in text and "temperature 0.1 -> " in text and "on the other half" in text
    assert fitted_fields(before, run) == []
    recipe = write_fit(RunFolder(run), found)
    again = RunFolder(run).recipe()
    assert again == recipe and again.ensemble.temperature == found["recipe"]["temperature"] and again.train == before.train
    assert again.ensemble.posterior_prior == found["recipe"]["posterior_prior"] and set(again.ensemble.posterior_prior) == {
        "en",
        "ja",
        "ru",
    }
    assert set(fitted_fields(again, run)) == {name for name, value in found["recipe"].items() if value is not None}
    assert "temperature" not in fitted_fields(before, run), "the recipe has another value since"
    for name in ("ensemble", "evaluation"):
        shutil.rmtree(run / name)
    results = evaluate(run, again)
    assert "temperature" in results["settings"]["fitted on half of this text"]
    data = load_ensemble(run / "ensemble").data
    assert data.posterior_prior == pytest.approx(list(found["recipe"]["posterior_prior"].values()))
    # the figures of the other half come out again
    half, other = read_halves(run, load_ensemble(run / "ensemble"))
    nats = mixture_nats(other, load_ensemble(run / "ensemble").router("tfidf"), None)
    assert mean_bits(other, nats) == pytest.approx(found["routers"]["tfidf"]["other_half"]["fitted"]["value"], abs=1e-6)


def test_what_cannot_be_fitted_is_told(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(MegaxelmError, match="choose one of language"):
        fit_run(evaluated, router="wrong")
    with pytest.raises(MegaxelmError, match="--tolerance -1: choose 0 or more"):
        fit_run(evaluated, tolerance=-1)
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    path = run / "evaluation" / "streams.npz"
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"experts": np.array(["en", "ja"])}))
    with pytest.raises(MegaxelmError, match="the ensemble has en, ja, ru, dense; evaluate the run again"):
        fit_run(run)
    count = int(arrays["lengths|ja"][0])
    one = {"ids|ja": arrays["ids|ja"][:count], "lengths|ja": arrays["lengths|ja"][:1], "logprobs|ja": arrays["logprobs|ja"][:, :count]}
    np.savez(path, **(arrays | one | {"bytes|ja": arrays["bytes|ja"][:1]}))
    with pytest.raises(MegaxelmError, match="ja has a single held-out document.*evaluation.max_documents"):
        fit_run(run)
    path.unlink()
    with pytest.raises(MegaxelmError, match="streams.npz: no such file.*--from evaluation"):
        fit_run(run)


def test_a_router_without_settings_fits_the_fallback_alone(evaluated: Path) -> None:
    found = fit_run(evaluated, router="uniform")
    ensemble = load_ensemble(evaluated / "ensemble")
    half, _ = read_halves(evaluated, ensemble)
    row = found["routers"]["uniform"]
    weight = row["fitted"]["fallback_weight"]
    assert found["recipe"]["fallback_weight"] == weight == found["routers"]["tfidf"]["fitted"]["fallback_weight"]
    bits = {w: mean_bits(half, mixture_nats(half, ensemble.router("uniform", fallback_weight=w), None)) for w in (weight, 0.01, 0.1, 0.3)}
    assert min(bits.values()) == pytest.approx(bits[weight], abs=1e-6)
    assert json.dumps(found)
