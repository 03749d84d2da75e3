"""The forgetting matrix: from tables, from runs, in words and on the console."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import evaluate

from megaxelm.errors import MegaxelmError
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.forgetting import forgetting_results, run_matrix
from megaxelm.evaluate.forgetting_table import print_forgetting
from megaxelm.evaluate.matrix_csv import read_matrix_csv
from megaxelm.evaluate.run_forgetting import read_parents, run_forgetting
from megaxelm.evaluate.statistics import Bootstrap
from megaxelm.recipe import Recipe

TABLE = """expert,ar,el,hi
baseline,16,10,18
t.0,12,26,19
t.1,20,8,20
t.2,18,12,9
"""
"""On its own language each expert gains; t.0 more than doubles the perplexity of el."""


def table(tmp_path: Path, text: str = TABLE) -> dict[str, Any]:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return forgetting_results(read_matrix_csv(path))


def test_changes_and_summaries_of_a_table(tmp_path: Path) -> None:
    found = table(tmp_path)
    assert (found["unit"], found["reference"]) == ("bits per token", "baseline")
    assert {key: row["own"] for key, row in found["models"].items()} == {"baseline": [], "t.0": ["ar"], "t.1": ["el"], "t.2": ["hi"]}
    cell = found["models"]["t.0"]["change"]["baseline"]["el"]
    assert cell == pytest.approx({"bits": math.log2(2.6), "perplexity": 16, "perplexity_percent": 160})
    summary = found["models"]["t.0"]["summary"]["baseline"]
    assert summary["own"]["mean_perplexity_percent"] == pytest.approx(-25)
    elsewhere = summary["elsewhere"]
    assert elsewhere["mean_perplexity_percent"] == pytest.approx((160 + 100 / 18) / 2) and elsewhere["worse_in"] == 2
    assert (elsewhere["worst"]["language"], elsewhere["best"]["language"], elsewhere["languages"]) == ("el", "hi", 2)
    assert "best of its family" in found["notes"][0]
    text = " ".join(found["verdict"])
    assert "at best -50.0 % (t.2 on hi)" in text and "the worst is t.0 on el: +160.0 % (+16.0 perplexity)" in text and "6 of 6" in text


def test_what_a_wrong_choice_costs(tmp_path: Path) -> None:
    choice = table(tmp_path)["choice"]["t"]
    own = np.log2([12 / 16, 8 / 10, 9 / 18]).mean()
    wrong = np.mean([np.log2([20 / 16, 18 / 16]).mean(), np.log2([26 / 10, 12 / 10]).mean(), np.log2([19 / 18, 20 / 18]).mean()])
    against = choice["against"]["baseline"]
    assert against["own"] == pytest.approx(own) and against["oracle"] == pytest.approx(own) and against["wrong"] == pytest.approx(wrong)
    assert against["blind"] == pytest.approx((own + 2 * wrong) / 3)
    assert choice["wrong_costs"] == pytest.approx(wrong - own)
    # at this share of mistakes nothing is gained
    share = against["break_even_error"]
    assert (1 - share) * own + share * wrong == pytest.approx(0)


PUBLISHED = """expert,el,hi,ur,zh
baseline,10.698,18.164,14.379,18.531
typ8.1,9.424,25.415,16.956,19.413
typ8.3,26.584,11.124,12.599,15.219
typ8.6,18.792,23.638,16.927,11.988
"""
"""Of the perplexities that the authors of X-ELM released (Blevins et al., 2024), in XGLM tokens."""


def test_the_published_experts_gain_at_home_and_forget_elsewhere(tmp_path: Path) -> None:
    found = table(tmp_path, PUBLISHED)
    assert [found["models"][f"typ8.{number}"]["own"] for number in (1, 3, 6)] == [["el"], ["hi", "ur"], ["zh"]]
    text = " ".join(found["verdict"])
    assert "at best -38.8 % (typ8.3 on hi)" in text and "typ8.3 on el: +148.5 % (+15.9 perplexity)" in text


@pytest.mark.parametrize(("scale", "share", "words"), [(1.5, None, "gains nothing"), (0.1, 1.0, "always wrong loses nothing")])
def test_experts_that_never_pay_and_that_always_pay(scale: float, share: float | None, words: str, tmp_path: Path) -> None:
    rows = [line.split(",") for line in TABLE.split()]
    rows[2:] = [[row[0], *(str(max(1.0, float(value) * scale)) for value in row[1:])] for row in rows[2:]]
    rows[1] = [rows[1][0], "12", "8", "9"] if scale > 1 else rows[1]
    found = table(tmp_path, "\n".join(",".join(row) for row in rows))
    assert found["choice"]["t"]["against"]["baseline"]["break_even_error"] == share
    assert words in " ".join(found["verdict"])


def test_own_languages_and_parents_can_be_told(tmp_path: Path) -> None:
    found = table(tmp_path, "expert,own,parent,ar,el\nseed,,,16,10\nbig,ar el,seed,12,11\nsmall,el,big,13,9\ndense,,seed,15,9.5\n")
    models = found["models"]
    assert models["big"]["own"] == ["ar", "el"] and found["notes"] == [] and found["reference"] == "seed"
    assert set(models["small"]["change"]) == {"seed", "big"} and set(models["big"]["change"]) == {"seed"}
    assert models["small"]["change"]["big"]["ar"]["perplexity"] == pytest.approx(1)
    assert set(found["choice"][""]["against"]) == {"seed", "dense"}
    assert "elsewhere" not in models["big"]["summary"]["seed"]
    assert "big is worse on its own el (+10.0 %)" in " ".join(found["verdict"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("model,ar\nseed,1\n", "no column `expert`"),
        ("expert,ar,ar\nseed,1,2\n", "two have the same"),
        ("expert,ar\nseed,10\nx,abc\n", r"row 3 \(x\), column ar: 'abc': a perplexity is a number of at least 1"),
        ("expert,ar\nseed,10\nx,0.5\n", "at least 1"),
        ("expert,ar\nseed,10\nx,nan\n", "at least 1"),
        ("expert,ar,el\nseed,10,11\nx,12\n", "row 3 has 2 cells, the header 3"),
        ("expert,ar\nseed,10\nx,12\nx,13\n", "a name of its own"),
        ("expert,ar\nx,12\n", "no row named seed, baseline, dense"),
        ("expert,ar\nseed,12\n", "at least one expert"),
        ("expert,own,ar\nseed,,12\nx,fr,11\n", "own = fr: no such column"),
        ("expert,parent,ar\nseed,,12\nx,y,11\n", "parent = y: no such row"),
    ],
)
def test_tables_that_cannot_be_read_are_told(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MegaxelmError, match=message):
        table(tmp_path, text)


def test_a_missing_table_and_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    with pytest.raises(MegaxelmError, match="no such file"):
        read_matrix_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("expert,é\n".encode("latin-1"))
    with pytest.raises(MegaxelmError, match="cannot be read as CSV in UTF-8"):
        read_matrix_csv(tmp_path / "latin.csv")


def scores(tokens: int = 30, documents: int = 12) -> DocumentScores:
    """Two experts over a seed; a gains on x for certain, and on z changes by chance alone."""
    draw = np.random.default_rng(0)
    sizes = {code: np.full(documents, tokens) for code in ("x", "y", "z")}
    seed = {code: draw.normal(60, 5, documents) for code in sizes}
    changes = {
        "expert:a": {"x": -9.0, "y": 12.0, "z": 0.0},
        "expert:b": {"x": 6.0, "y": -3.0, "z": -8.0},
        "mixture:m": dict.fromkeys(sizes, -1.0),
    }
    nats = {key: {code: seed[code] + value + draw.normal(0, 1, documents) for code, value in row.items()} for key, row in changes.items()}
    nats["expert:a"]["z"] = seed["z"] + np.tile([4.0, -4.0], documents // 2)
    return DocumentScores({"seed": seed} | nats, sizes, sizes)


def test_a_run_has_intervals_and_parents() -> None:
    documents = scores()
    bootstrap = Bootstrap(documents.nats, documents.num_bytes, resamples=500)
    own = {"x": "expert:a", "y": "expert:b", "z": "expert:b"}
    found = forgetting_results(
        run_matrix(documents, own, {"mixture:m": "m mixture"}, {"expert:a": "seed", "expert:b": "expert:a", "seed": None}, bootstrap)
    )
    models = found["models"]
    assert (found["unit"], models["expert:a"]["label"], models["mixture:m"]["label"]) == ("bits per byte", "a", "m mixture")
    cell = models["expert:a"]["change"]["seed"]["x"]
    expected = bootstrap.language("expert:a", "x", "seed")
    assert (cell["bits"], cell["low"], cell["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert models["expert:a"]["change"]["seed"]["z"]["low"] < 0 < models["expert:a"]["change"]["seed"]["z"]["high"]
    cell, expected = models["expert:b"]["change"]["expert:a"]["y"], bootstrap.language("expert:b", "y", "expert:a")
    assert (cell["bits"], cell["low"], cell["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    own_part = models["expert:b"]["summary"]["expert:a"]["own"]
    expected = bootstrap.mean("expert:b", "expert:a", ["y", "z"])
    assert (own_part["mean_bits"], own_part["low"]) == pytest.approx((expected.value, expected.low)) and own_part["languages"] == 2
    assert set(models["mixture:m"]["summary"]["seed"]) == {"all"}
    assert "M mixture: -0.0" in found["verdict"][-1] and "it forgets nothing" in found["verdict"][-1]


def test_a_model_may_lack_languages() -> None:
    documents = scores()
    del documents.nats["expert:a"]["y"]
    found = forgetting_results(run_matrix(documents, {"x": "expert:a", "z": "expert:b"}, {}, {}))
    assert set(found["models"]["expert:a"]["change"]["seed"]) == {"x", "z"} and found["choice"][""]["languages"] == 2
    text = io.StringIO()
    print_forgetting(found, text, 100)
    assert " - " in text.getvalue()


def test_an_evaluated_run_and_one_from_before(make_run: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = make_run("language")
    members = {
        name: {"parent": None if name == "seed" else "seed" if name != "ru" else "ja"} for name in ("seed", "dense", "en", "ja", "ru")
    }
    (run / "lineage.json").write_text(json.dumps({"experts": members}))
    assert read_parents(run)["expert:ru"] == "expert:ja" and read_parents(run)["expert:en"] == "seed"
    results = evaluate(run, make_recipe("language", evaluation={"routers": ["posterior"], "top_m": [1]}))
    found = run_forgetting(run)
    assert found == results["forgetting"] and set(found["models"]["expert:ru"]["change"]) == {"seed", "expert:ja"}
    for name in ("statistics", "routers", "forgetting"):
        del results[name]
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    before = run_forgetting(run)
    assert list(before["models"]) == list(found["models"]) and "no intervals" in before["notes"][-1]
    for key, row in before["models"].items():
        assert row["label"] == found["models"][key]["label"] and row["own"] == found["models"][key]["own"]
        for language, value in row["perplexity"].items():
            assert value == pytest.approx(found["models"][key]["perplexity"][language])
    assert "low" not in before["models"]["expert:ja"]["change"]["seed"]["ja"]
    (run / "evaluation" / "results.json").unlink()
    with pytest.raises(MegaxelmError, match="evaluate the run first: megaxelm evaluate"):
        run_forgetting(run)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_cuts_no_figure(width: int, tmp_path: Path) -> None:
    found, text = table(tmp_path), io.StringIO()
    print_forgetting(found, text, width)
    words = text.getvalue().replace("*", "").split()
    for row in found["models"].values():
        for cell in row["change"].get("baseline", {}).values():
            assert f"{cell['perplexity_percent']:+.1f}" in words
    assert max(map(len, text.getvalue().partition("expert ")[0].splitlines()[1:])) <= max(width, 80)
    assert "…" not in text.getvalue() and "-25.0*" in text.getvalue() and "+160.0*" not in text.getvalue()


@pytest.mark.parametrize("width", range(90, 170, 10))
def test_a_wide_table_cuts_no_figure_just_where_it_fits(width: int, tmp_path: Path) -> None:
    codes = [f"l{number}" for number in range(16)]
    rows = [["expert", *codes], ["baseline", *["20.0"] * 16], *([f"expert-{row}", *[f"{18 + 0.1 * row}"] * 16] for row in range(3))]
    text = io.StringIO()
    print_forgetting(table(tmp_path, "\n".join(",".join(row) for row in rows)), text, width)
    assert "…" not in text.getvalue() and text.getvalue().count("-10.0*") == 16
