"""The verdict must be true whoever wins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaxelm.report.data import RunData
from megaxelm.report.load import load_run
from megaxelm.report.page import render_page
from megaxelm.report.verdict import format_bits, format_count, judge


@pytest.fixture
def judged(run_maker: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[RunData, str]]:
    """Make a run of four languages with these (own, dense) scores, load it, and give it with the text of its verdict."""

    def make(scores: dict[str, tuple[Any, Any]], **account: Any) -> tuple[RunData, str]:
        folder = make.folder = run_maker(tmp_path / "run", 4, 2, lines=3)  # type: ignore[attr-defined]
        path = folder / "evaluation/results.json"
        results = json.loads(path.read_text(encoding="utf-8"))
        for key, place in (("own", 0), ("dense", 1)):
            values = {code: pair[place] for code, pair in scores.items()}
            known = [value for value in values.values() if value is not None]
            results["models"][key]["languages"] = {code: {"bits_per_byte": value, "perplexity": 9.0} for code, value in values.items()}
            results["models"][key]["mean_bits_per_byte"] = sum(known) / len(known)
        path.write_text(json.dumps(results), encoding="utf-8")
        if account:
            path = folder / "account.json"
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | account), encoding="utf-8")
        run = load_run(folder)
        verdict = judge(run)
        return run, " ".join([verdict.headline, *verdict.sentences])

    return make


ALL = {"ar": (1.0, 1.5), "az": (1.0, 1.5), "bg": (1.0, 1.5), "de": (1.0, 1.5)}


def test_own_expert_better_everywhere(judged: Any) -> None:
    run, text = judged(ALL)
    assert "beats the dense model (4 of 4)" in text and "Not better" not in text
    assert "own expert 1.000, dense model 1.500; the own expert needs 0.500 (33.3%) fewer" in text
    assert "equal training tokens" in text and "NOT" not in text
    assert '<h1 class="good">' in render_page(run, {})


def test_languages_that_were_added_are_another_comparison(judged: Any) -> None:
    judged(ALL | {"bg": (1.0, 9.0), "de": (1.6, 1.5)})
    folder = judged.folder
    path = folder / "evaluation/results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["languages"][2]["grown"] = True  # bg
    own = results["languages"][2]["own"]
    of_all = {code: {"bits_per_byte": 0.8 if code == "bg" else 7.25, "perplexity": 9.0} for code in ALL}
    for key in (f"lapt:{own}-lapt-dense", f"lapt:{own}-lapt-seed", "lapt:other-lapt-seed"):
        bits = 0.8 if key.endswith("dense") else 0.9
        found = of_all | {"bg": {"bits_per_byte": 0.1 if "other" in key else bits, "perplexity": 9.0}}
        results["models"][key] = {"label": key, "languages": found, "mean_bits_per_byte": 7.25}
    for key in ("own", "dense"):
        of_model = results["models"][key]["languages"]
        results["models"][key]["mean_bits_per_byte"] = sum(of_model[code]["bits_per_byte"] for code in ("ar", "az", "de")) / 3
    path.write_text(json.dumps(results), encoding="utf-8")
    run = load_run(folder)
    verdict = judge(run)
    assert verdict.headline == "The own expert beats the dense model in 2 of 3 languages, and on average"
    assert list(verdict.differences) == ["ar", "az", "de"] and "Added later, and not in these figures: bg." in verdict.sentences[-1]
    page = render_page(run, {})
    table = page[page.index('id="table-grown"') :].split("</table>")[0]
    assert "dense, continued" in table and table.count("<tr>") == 2
    assert '<td class="best">0.800<' in table and "0.900" in table and "0.100" not in table and "9.000" in table
    before = page[: page.index('id="grown"')]
    assert "lapt" not in before.lower() and "7.250" not in before
    assert 'scope="row">bg<' not in before.split("Perplexity per token")[0]


def test_where_dense_wins_is_named_with_the_difference_worst_first(judged: Any) -> None:
    run, text = judged(ALL | {"az": (1.512, 1.5), "de": (1.5004, 1.5)})
    assert "in 2 of 4 languages, and on average" in text
    assert "Not better in az (by 0.012), de (by 0.0004)." in text
    assert '<h1 class="bad">' in render_page(run, {})


def test_dense_better_on_average_is_said_in_the_headline(judged: Any) -> None:
    run, text = judged(ALL | {"az": (5.0, 1.5)})
    assert "in 3 of 4 languages, but the dense model is better on average" in text and "more." in text
    assert '<h1 class="mixed">' in render_page(run, {})


def test_dense_better_everywhere(judged: Any) -> None:
    _, text = judged({code: (dense, own) for code, (own, dense) in ALL.items()})
    assert "in none of 4 languages" in text and "needs 0.500 (50.0%) more" in text


def test_a_tie_is_no_win(judged: Any) -> None:
    _, text = judged(ALL | {"bg": (1.5, 1.5)})
    assert "3 of 4" in text and "Exactly equal in bg." in text


@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_score_that_is_not_known_is_neither_win_nor_loss(judged: Any, lost: float | None) -> None:
    run, text = judged(ALL | {"ar": (1.0, 1.2), "bg": (lost, 9.5)})
    assert "in all 3 languages that can be compared, of 4" in text and "Not comparable in 1 of 4 languages" in text
    assert "own expert 1.000, dense model 1.400; the own expert needs 0.400" in text
    page = render_page(run, {})
    assert ">n/a<" in page and ">nan<" not in page and '<h1 class="mixed">' in page


def test_unequal_tokens_are_shouted_and_never_shown_as_a_good_result(judged: Any) -> None:
    run, text = judged(ALL, equal=False, dense_tokens=500_000)
    assert "NOT equal" in text and "dense model got 500" in text
    page = render_page(run, {})
    assert '<h1 class="good">' not in page and "<b>not equal</b>" in page


def test_without_dense_no_win_is_claimed(judged: Any, tmp_path: Path) -> None:
    judged(ALL)
    path = tmp_path / "run/evaluation/results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    del results["models"]["dense"]
    path.write_text(json.dumps(results), encoding="utf-8")
    run = load_run(tmp_path / "run")
    verdict = judge(run)
    assert verdict.headline == "There is no dense baseline to compare with" and verdict.differences == {}
    from megaxelm.report.plots import draw_figures

    figures = draw_figures(run)
    assert "than the seed model" in figures["heat"].caption
    assert "beats" not in render_page(run, figures)


def test_the_stored_verdict_is_not_trusted(judged: Any, tmp_path: Path) -> None:
    judged(ALL | {"az": (1.6, 1.5)})
    path = tmp_path / "run/evaluation/results.json"
    results = json.loads(path.read_text(encoding="utf-8")) | {"verdict": {"beaten": ["ar", "az", "bg", "de"], "not_beaten": {}}}
    path.write_text(json.dumps(results), encoding="utf-8")
    assert "Not better in az" in " ".join(judge(load_run(tmp_path / "run")).sentences)


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(2.6514, False, "2.651"), (-0.0123, True, "−0.012"), (0.00004, True, "+0.00004"), (0.0, True, "+0.000"), (math.nan, True, "n/a")],
)
def test_format_bits(value: float, signed: bool, text: str) -> None:
    assert format_bits(value, signed) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (65_536, "65.5 k"),
        (1_048_576, "1.05 M"),
        (999_960, "1 M"),
        (10.49e9, "10.5 G"),
    ],
)
def test_format_count(value: float | None, text: str) -> None:
    assert format_count(value).replace("\N{NO-BREAK SPACE}", " ") == text
