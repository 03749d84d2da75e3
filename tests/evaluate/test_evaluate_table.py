"""The table on the console."""

from __future__ import annotations

import io
from typing import Any

import pytest

from megaxelm.evaluate.table import print_table, verdict_text


def results_of(languages: int, routers: int = 4, own: str = "hi-ur", lose: int = 1) -> dict[str, Any]:
    codes = [f"{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(languages)]
    models = {}
    labels = {"seed": "seed", "dense": "dense", "own": "own expert"}
    labels |= {
        f"mixture-{number}": name
        for number, name in enumerate(["language mixture", "tfidf mixture, top 2", "posterior mixture", "uniform mixture"][:routers])
    }
    labels["worst"] = "worst expert"
    for place, (key, label) in enumerate(labels.items()):
        values = {code: 2.0 + 0.111 * number + 0.013 * place for number, code in enumerate(codes)}
        if key == "own":
            values = {code: 1.9 + 0.1 * number if number >= lose else 9.5 for number, code in enumerate(codes)}
        models[key] = {
            "label": label,
            "languages": {code: {"bits_per_byte": value, "perplexity": 10.0} for code, value in values.items()},
            "mean_bits_per_byte": sum(values.values()) / languages,
            "worst_language": codes[-1],
            "worst_bits_per_byte": max(values.values()),
        }
    own_bits, dense_bits = models["own"]["languages"], models["dense"]["languages"]
    difference = {code: own_bits[code]["bits_per_byte"] - dense_bits[code]["bits_per_byte"] for code in codes}
    return {
        "languages": [{"code": code, "own": own, "documents": 1, "bytes": 10, "tokens": 5} for code in codes],
        "models": models,
        "verdict": {
            "beaten": [code for code, value in difference.items() if value < 0],
            "not_beaten": {code: value for code, value in difference.items() if value >= 0},
        },
        "account": {"equal": True},
    }


def printed(results: dict[str, Any], width: int | None) -> str:
    file = io.StringIO()
    print_table(results, file=file, width=width)
    return file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 160, 400])
@pytest.mark.parametrize("own", ["de", "ar-bg-de-el-en-es-fr-hi-ja-ko-ru"])
def test_no_figure_is_cut_at_any_width(width: int, own: str) -> None:
    results = results_of(16, own=own)
    text = printed(results, width)
    assert "…" not in text
    words = text.split()
    for model in results["models"].values():
        for score in model["languages"].values():
            number = f"{score['bits_per_byte']:.3f}"
            assert number in words or f"{number}*" in words
        for word in model["label"].split():
            assert word in words
    assert words.count(own) == 16


@pytest.mark.parametrize("width", [80, 100, 160])
def test_lines_stay_inside_the_terminal(width: int) -> None:
    table, _, _ = printed(results_of(16), width).partition("own expert beats")
    assert max(map(len, table.splitlines())) <= width


def test_each_row_has_its_best_starred() -> None:
    lines = printed(results_of(3, lose=0), 200).splitlines()
    for start in ("aa", "ab", "ac", "mean", "worst"):
        (line,) = [line for line in lines if line.split()[:1] == [start]]
        assert line.count("*") == 1
        assert line.split()[3].endswith("*"), "the own expert is best in this fixture"


def test_without_a_terminal_nothing_but_text_is_printed() -> None:
    assert "\x1b" not in printed(results_of(3), 100)


def test_verdict_says_where_the_expert_loses_and_by_how_much() -> None:
    text = verdict_text(results_of(4))
    assert text.startswith("own expert beats dense in 3 of 4 languages")
    assert "not in: aa by 7.487" in text


def test_verdict_without_losses_unequal_tokens_and_no_dense() -> None:
    results = results_of(2, lose=0)
    assert "not in" not in verdict_text(results)
    results["account"] = {"equal": False}
    assert "did NOT get equal training tokens" in verdict_text(results)
    results["verdict"] = None
    assert "no dense baseline" in verdict_text(results)
