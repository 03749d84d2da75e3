"""Intervals against scipy and by how often they hold the truth, paired differences, means, inequality, several seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megaxelm.evaluate.statistics import Bootstrap, Interval, across_seeds, bits_per_byte, bootstrap_interval, gini


def documents(count: int, seed: int, rate: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes of documents of very different lengths whose own rates differ: the truth is `rate` bits per byte."""
    draw = np.random.default_rng(seed)
    num_bytes = draw.lognormal(6, 0.8, count).astype(np.int64) + 1
    return num_bytes * math.log(2) * (rate + draw.normal(0, 0.2, count)), num_bytes


def ratio(nats: np.ndarray, num_bytes: np.ndarray, axis: int = -1) -> np.ndarray:
    return nats.sum(axis) / math.log(2) / num_bytes.sum(axis)


def test_bits_per_byte_is_the_ratio_of_sums() -> None:
    assert bits_per_byte([math.log(2) * 6, math.log(2) * 2], [2, 6]) == pytest.approx(1.0)
    assert bits_per_byte(math.log(2), 4) == pytest.approx(0.25)


def test_intervals_agree_with_scipy() -> None:
    nats, num_bytes = documents(60, 0)
    base = nats * 1.05 + np.random.default_rng(1).normal(0, 5, 60)
    found = bootstrap_interval(nats, num_bytes, resamples=20_000)
    theirs = stats.bootstrap((nats, num_bytes), ratio, paired=True, method="percentile", n_resamples=20_000, vectorized=True, rng=4)
    assert found.value == pytest.approx(float(ratio(nats, num_bytes)))
    assert [found.low, found.high] == pytest.approx(list(theirs.confidence_interval), abs=0.02 * (found.high - found.low))  # type: ignore[operator]

    difference = bootstrap_interval(nats, num_bytes, base, resamples=20_000, confidence=0.8)
    theirs = stats.bootstrap(
        (nats, base, num_bytes), lambda a, b, n, axis=-1: ratio(a - b, n, axis), paired=True, method="percentile", n_resamples=20_000,
        confidence_level=0.8, vectorized=True, rng=4,
    )  # fmt: skip
    assert difference.value == pytest.approx(float(ratio(nats - base, num_bytes)))
    width = difference.high - difference.low  # type: ignore[operator]
    assert [difference.low, difference.high] == pytest.approx(list(theirs.confidence_interval), abs=0.03 * width)
    # pairing counts: the difference is known far better than either figure
    assert width < 0.25 * (found.high - found.low)  # type: ignore[operator]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = {"language": 0, "mean": 0, "difference": 0}
    trials = 300
    for trial in range(trials):
        rates = {"a": 1.0, "b": 2.0, "c": 1.5}
        found = {code: documents(40, 1000 * trial + number, rate) for number, (code, rate) in enumerate(rates.items())}
        nats, num_bytes = {code: pair[0] for code, pair in found.items()}, {code: pair[1] for code, pair in found.items()}
        draw = np.random.default_rng(trial)
        other = {code: value + num_bytes[code] * math.log(2) * draw.normal(0.1, 0.05, 40) for code, value in nats.items()}
        bootstrap = Bootstrap({"m": nats, "o": other}, num_bytes, resamples=800, seed=trial)
        for name, interval, truth in (
            ("language", bootstrap.language("m", "b"), 2.0),
            ("mean", bootstrap.mean("m"), 1.5),
            ("difference", bootstrap.mean("o", "m"), 0.1),
        ):
            held[name] += interval.low <= truth <= interval.high  # type: ignore[operator]
    # 95 % of 300 with a standard error of 1.3 %; percentile intervals of 40 documents are a little short
    assert all(0.89 < count / trials < 0.985 for count in held.values()), held


def test_the_mean_is_over_languages_and_the_worst_is_the_largest() -> None:
    found = {code: documents(30, number, rate) for number, (code, rate) in enumerate({"a": 1.0, "b": 3.0, "c": 1.1}.items())}
    nats, num_bytes = {code: pair[0] for code, pair in found.items()}, {code: pair[1] for code, pair in found.items()}
    shifts = {"a": 0.2, "b": -0.1, "c": 0.11}
    base = {code: nats[code] + shift * math.log(2) * num_bytes[code] for code, shift in shifts.items()}
    bootstrap = Bootstrap({"m": nats, "base": base}, num_bytes)
    points = {code: bits_per_byte(nats[code], num_bytes[code]) for code in nats}
    assert bootstrap.mean("m").value == pytest.approx(sum(points.values()) / 3)
    assert bootstrap.worst("m").value == pytest.approx(points["b"])
    assert bootstrap.mean("m", languages=["a"]) == bootstrap.language("m", "a")
    # a difference that is the same in every document is known exactly
    for interval, value in (
        (bootstrap.language("m", "a", "base"), -0.2),
        (bootstrap.mean("m", "base"), -0.07),
        (bootstrap.worst("m", "base"), 0.1),
        (bootstrap.gini("m", "base"), float(gini([0.2, -0.1, 0.11]))),
    ):
        assert [interval.value, interval.low, interval.high] == pytest.approx([value] * 3, abs=1e-9)
    assert bootstrap.mean("m", "base").sign == -1 and bootstrap.worst("m", "base").sign == 1
    assert bootstrap_interval(nats, num_bytes, base) == bootstrap.mean("m", "base")


def test_draws_of_a_language_do_not_depend_on_its_company() -> None:
    nats, num_bytes = documents(25, 3)
    alone = Bootstrap({"m": {"a": nats}}, {"a": num_bytes}, resamples=500)
    together = Bootstrap({"m": {"b": nats, "a": nats}, "n": {"b": nats}}, {"b": num_bytes, "a": num_bytes}, resamples=500)
    assert alone.language("m", "a") == together.language("m", "a")
    assert together.language("m", "b").low != pytest.approx(together.language("m", "a").low, rel=1e-6)
    assert together.languages_of("m", "n") == ["b"] and together.mean("m", "n").value == 0
    assert Bootstrap({"m": {"a": nats}}, {"a": num_bytes}, resamples=500, seed=1).language("m", "a") != alone.language("m", "a")


def test_many_resamples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    nats, num_bytes = documents(50, 5)
    whole = bootstrap_interval(nats, num_bytes, resamples=2000)
    monkeypatch.setattr("megaxelm.evaluate.statistics._CELLS", 50 * 300)
    assert bootstrap_interval(nats, num_bytes, resamples=2000) == whole


def test_a_single_document_has_no_interval() -> None:
    bootstrap = Bootstrap({"m": {"a": [3.0], "b": [2.0, 1.0]}}, {"a": [2], "b": [1, 1]})
    assert (bootstrap.language("m", "a").low, bootstrap.mean("m").high) == (None, None) and bootstrap.mean("m").sign == 0
    assert bootstrap.language("m", "b").low is not None


def test_nothing_that_touches_zero_is_called_a_difference() -> None:
    assert [Interval(0.1, low, high).sign for low, high in ((0.01, 0.2), (-0.01, 0.2), (-0.2, -0.1), (0.0, 0.1))] == [1, 0, -1, 0]


def test_gini_of_signed_gains() -> None:
    assert float(gini([1.0, 1.0, 1.0])) == 0 and float(gini([0.0, 0.0, 5.0])) == pytest.approx(1)
    assert float(gini([-2.0, 0.0, 0.0, 3.0])) == pytest.approx(1), "one gains, one loses: as unequal as can be"
    assert float(gini([0.0, 0.0])) == 0 and float(gini([4.0])) == 0
    values = np.array([0.3, -0.1, 0.25, 0.05, 0.0])
    pairs = np.abs(values[:, None] - values).sum() / (2 * 4 * np.abs(values).sum())
    assert float(gini(values)) == pytest.approx(pairs)
    assert gini(np.stack([values, values * 3], 1), axis=0) == pytest.approx([pairs, pairs])


def test_several_seeds_have_mean_and_spread() -> None:
    found = across_seeds([1.0, 1.2, 1.4])
    low, high = stats.t.interval(0.95, 2, 1.2, stats.sem([1.0, 1.2, 1.4]))
    assert (found.mean, found.deviation, found.runs) == (pytest.approx(1.2), pytest.approx(0.2), 3)
    assert [found.low, found.high] == pytest.approx([low, high])
    assert across_seeds([2.0]).deviation is None
    with pytest.raises(ValueError, match="at least one training"):
        across_seeds([])
