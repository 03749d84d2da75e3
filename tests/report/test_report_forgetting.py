"""Who forgets what, router quality, intervals and further text: on the report, and on a page of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaxelm.errors import StageError
from megaxelm.report.forgetting import draw_forgetting, draw_parents, write_forgetting_page
from megaxelm.report.heat import percent_cell
from megaxelm.report.load import load_run
from megaxelm.report.measured import Forgetting, RouterRow
from megaxelm.report.page import _true_minus
from megaxelm.report.router_plots import draw_routers
from megaxelm.report.stage import build_report
from megaxelm.report.svg import figure_style

CODES = ["ar", "az", "bg", "de"]
EXPERTS = {"ar-az": ["ar", "az"], "bg-de": ["bg", "de"]}


def change(bits: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"bits": bits, "perplexity": 10 * bits, "perplexity_percent": 100 * bits, "low": low, "high": high}


def part(bits: float, language: str, worse: int = 0) -> dict[str, Any]:
    cell = change(bits) | {"language": language}
    percent = {"mean_bits": bits, "mean_perplexity_percent": 100 * bits, "low": bits - 0.011, "high": bits + 0.022}
    return percent | {"languages": 2, "worse_in": worse, "best": cell, "worst": cell}


def forgetting(label: str = "ar-az") -> dict[str, Any]:
    """Two experts: the first gains 0.31 on ar and changes az by chance; the second branched from the first."""
    models: dict[str, Any] = {"seed": {"label": "seed", "kind": "seed", "own": [], "change": {}, "summary": {}}}
    for key, bits in (
        ("expert:ar-az", (-0.31, 0.02, 0.41, 0.52)),
        ("expert:bg-de", (0.23, 0.24, -0.13, -0.14)),
        ("mixture:tfidf@2", (-0.07,) * 4),
    ):
        cells = {code: change(value, value - 0.01, value + 0.01) for code, value in zip(CODES, bits, strict=True)}
        if key == "expert:ar-az":
            cells["az"] = change(0.02, -0.03, 0.07)
        name = key.partition(":")[2]
        own = EXPERTS.get(name, [])
        summary = {"own": part(-0.145, "ar"), "elsewhere": part(0.465, "de", 2)} if own else {"all": part(-0.07, "ar")}
        shown = label if name == "ar-az" else "tfidf mixture, top 2" if not own else name
        models[key] = {"label": shown, "kind": key.partition(":")[0], "parent": "seed" if own else None, "own": own}
        models[key] |= {"change": {"seed": cells}, "summary": {"seed": summary}}
    models["expert:bg-de"] |= {"parent": "expert:ar-az"}
    models["expert:bg-de"]["change"]["expert:ar-az"] = {code: change(0.54) for code in CODES}
    models["expert:bg-de"]["summary"]["expert:ar-az"] = {"own": part(0.54, "bg", 2), "elsewhere": part(0.54, "ar", 2)}
    worth = {"own": -0.344, "oracle": -0.345, "wrong": 0.347, "blind": 0.174, "break_even_error": 0.497}
    choice = {"experts": 2, "languages": 4, "against": {"seed": worth}}
    return {
        "unit": "bits per byte",
        "reference": "seed",
        "languages": CODES,
        "models": models,
        "choice": {"": choice},
        "verdict": ["On their own languages -31.0 % <b>."],
        "notes": ["a note of it"],
    }


def routers() -> dict[str, Any]:
    bins = [
        {"from": 0.1 * n, "to": 0.1 * n + 0.1, "share": 0.25 if n > 5 else 0.0, "weight": 0.1 * n + 0.05 if n > 5 else None}
        for n in range(10)
    ]
    bins = [row | {"frequency": 0.5 if row["weight"] else None} for row in bins]
    bands = [
        {"from": a, "to": b, "tokens": 9, "accuracy_own": 0.5, "accuracy_best": 0.6, "regret_bits_per_token": 0.1}
        for a, b in ((0, 16), (16, 64))
    ]
    bands.append({"from": 64, "to": None, "tokens": 0, "accuracy_own": None, "accuracy_best": None, "regret_bits_per_token": None})
    row = {
        "accuracy_own": 0.789,
        "accuracy_best": 0.778,
        "weight_on_best": 0.75,
        "calibration": {"ece": 0.0782, "bins": bins},
        "by_position": bands,
    }
    regret = {"best-of-document": {"value": 0.027, "low": 0.024, "high": 0.031}, "seed": {"value": -0.319, "low": None, "high": None}}
    return {
        "mixture-tfidf": row | {"label": "tfidf mixture", "regret": regret},
        "mixture-tfidf@2": row | {"label": "tfidf mixture, top 2", "regret": regret},
    }


def statistics() -> dict[str, Any]:
    found = {"value": -0.127, "low": -0.134, "high": -0.1204}
    row = {"model": "own", "base": "dense", "mean": found, "worst": found | {"language": "az"}, "gini_of_gains": found | {"value": 0.26}}
    return {"resamples": 10_000, "confidence": 0.95, "differences": [row | {"better": CODES[:3], "worse": [], "unclear": ["de"]}]}


def texts() -> dict[str, Any]:
    score = {"bits": 42_700.0, "bits_per_byte": 2.5}
    rows = [{"code": code, "texts": 92, "bytes": 13_700} for code in CODES]
    model = {"label": "seed", "languages": {code: score for code in CODES}}
    return {"udhr": {"languages": rows, "models": {"seed": model, "expert:ar-az": model | {"label": "hidden here"}}}}


@pytest.fixture
def measured_run(run_maker: Callable[..., Path], tmp_path: Path) -> Path:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    path = folder / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    results |= {"forgetting": forgetting(), "routers": routers(), "statistics": statistics(), "texts": texts()}
    path.write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_the_report_tells_who_forgets_what(measured_run: Path) -> None:
    (measured_run / "report").mkdir()
    page = build_report(measured_run, measured_run / "report").read_text(encoding="utf-8")
    numbers = re.findall(r"<figcaption><b>Figure (\d+)\.</b>", page)
    assert numbers == [str(number) for number in range(1, 10)]
    section = page[page.index('id="forgetting"') : page.index('id="training"')]
    assert "On their own languages −31.0 % &lt;b&gt;." in section and "Note: a note of it" in section
    assert "−14.5\N{NO-BREAK SPACE}%" in section and "−0.156 to −0.123" in section and "2 of 2" in section
    for value in ("−0.344", "−0.345", "+0.347", "+0.174", "50 %"):
        assert f"<td>{value}</td>" in section
    table = section[section.index('id="table-routers"') :].split("</table>")[0]
    assert "78.9\N{NO-BREAK SPACE}%" in table and "+0.027<br>" in table and "+0.024 to +0.031" in table and "0.078" in table
    assert "regret: best expert of each document" in table and table.count("<tr>") == 3
    differences = page[page.index('id="table-differences"') :].split("</table>")[0]
    assert "−0.134 to −0.120" in differences and ">az<" in differences and "0.26" in differences and '"good"' in differences
    assert "another draw of documents" in page and "without a measure of chance" not in page
    further = section[section.index("Further text: udhr") :]
    assert "42.7<br>" in further and "hidden here" not in further
    assert "forgetting" not in " ".join(load_run(measured_run).missing)


def test_a_run_evaluated_before_says_what_it_lacks(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    run = load_run(run_maker(tmp_path / "run", 4, 2, lines=3))
    assert "evaluate again for them" in " ".join(run.missing) and run.forgetting is None and run.routers == {}


@pytest.mark.parametrize("name", ["forgetting", "routers", "statistics", "texts"])
def test_damaged_parts_are_told(name: str, measured_run: Path) -> None:
    path = measured_run / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    results[name] = {"x": 1}
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(StageError, match=rf"results.json: `{name}.*make it again"):
        load_run(measured_run)


def heat(found: dict[str, Any]) -> str:
    with figure_style():
        drawing = draw_forgetting(Forgetting.model_validate(found))
    assert drawing is not None
    return drawing.svg + drawing.caption


def test_the_heat_map_frames_own_languages_and_doubts_what_may_be_chance() -> None:
    drawn = heat(forgetting())
    assert all(f">{value}<" in drawn for value in ("−0.31", "+0.41", "+0.52", "−0.13", "−0.07"))
    assert re.search(r"italic[^<]*>\+0.02<", drawn) and "not told from chance" in drawn
    assert len(re.findall("font: italic|font-style: italic", drawn)) == 1
    assert drawn.count("stroke: #000000; stroke-width: 2.2") == 4
    assert ">tfidf @2<" in drawn and "@m: m experts kept" in drawn and ">seed<" not in drawn
    fewer = forgetting()
    fewer["models"]["expert:ar-az"]["own"] = ["ar"]
    assert heat(fewer).count("stroke: #000000; stroke-width: 2.2") == 3
    certain = forgetting()
    certain["models"]["expert:ar-az"]["change"]["seed"]["az"] = change(0.02)
    assert "italic" not in heat(certain) and "not told from chance" not in heat(certain)


def test_children_of_experts_are_drawn_against_their_parents() -> None:
    found = Forgetting.model_validate(forgetting())
    with figure_style():
        drawing = draw_parents(found)
    assert drawing is not None and drawing.svg.count("+0.54<") >= 4 and "branched from" in drawing.caption and ">ar-az<" not in drawing.svg
    alone = forgetting()
    alone["models"]["expert:bg-de"]["parent"] = "seed"
    assert draw_parents(Forgetting.model_validate(alone)) is None


def test_routers_are_drawn_by_their_bins_and_places() -> None:
    found = {key: RouterRow.model_validate(row) for key, row in routers().items()}
    with figure_style():
        drawing = draw_routers(found)
    assert drawing is not None and ">1–16<" in drawing.svg and ">17–64<" in drawing.svg and ">65 on<" not in drawing.svg
    assert drawing.svg.count(">tfidf mixture<") == 1 and "top 2" not in drawing.svg
    assert draw_routers({}) is None


def test_a_page_of_its_own_is_whole_and_escaped(tmp_path: Path) -> None:
    found = forgetting(label="<i>x</i>")
    found["unit"] = "bits per token"
    write_forgetting_page(found, "published <table>", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<i>x" not in page and "&lt;i&gt;x&lt;/i&gt;" in page and "published &lt;table&gt;" in page
    assert "http:" not in page and "https:" not in page
    assert "per cent of perplexity" in page and ">−31<" in page and ">+54<" in page.split("</figure>")[1]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and page.count("<figcaption>") == 2
    with pytest.raises(StageError, match="published: `forgetting.models"):
        write_forgetting_page(found | {"models": 3}, "published", tmp_path / "page.html")


def test_families_have_a_figure_each(tmp_path: Path) -> None:
    found = forgetting()
    for name, family in (("expert:ar-az", "a/b"), ("expert:bg-de", "c")):
        found["models"][name] |= {"family": family}
    found["models"]["expert:bg-de"]["parent"] = None
    found["choice"] = {"a/b": found["choice"][""], "c": found["choice"][""]}
    write_forgetting_page(found, "two", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    first, second = page.split("<figure")[1:3]
    assert ">+0.41<" in first and ">+0.23<" not in first and ">+0.23<" in second and page.count("<figure") == 2
    assert '<td class="text">a/b</td>' in page


def test_signs_of_numbers_are_true_minus_signs() -> None:
    assert _true_minus("by -3.2 % (-0.1 to -0.05) for ar-ja, typ-8, x-3") == "by −3.2 % (−0.1 to −0.05) for ar-ja, typ-8, x-3"
    assert [percent_cell(value) for value in (0.3, -0.4, 12.4, -12.6, 148.2)] == ["0", "0", "+12", "−13", "+148"]
