"""Rounds and grown experts in the report: the tree of the models, the token account, the curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaxelm.report.curves import _tokens_before, draw_curves
from megaxelm.report.load import load_run
from megaxelm.report.page import render_page


@pytest.fixture
def run(run_maker: Callable[..., Path], tmp_path: Path) -> Path:
    """Two experts under one of the round before, and one that was grown from the first."""
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    lineage = json.loads((folder / "lineage.json").read_text())
    experts: dict[str, Any] = lineage["experts"]
    for name in ("ar-az", "bg-de"):
        experts[name] |= {"parent": "round1-all", "round": 2, "tokens_seen": 3_000_000}
    experts["round1-all"] = experts["bg-de"] | {"parent": "seed", "round": 1, "tokens": 7_000, "languages": ["ar", "az", "bg", "de"]}
    experts["sv"] = {"parent": "ar-az", "kind": "grown", "round": 3, "tokens": 5, "languages": ["sv"], "folder": "grown/sv/experts/sv"}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    shutil.copytree(folder / "experts" / "bg-de", folder / "grown" / "sv" / "experts" / "sv")
    return folder


def test_the_tree_shows_rounds_and_what_was_seen(run: Path) -> None:
    page = render_page(load_run(run), {})
    tree = page[page.index('id="lineage"') :]
    tree = tree[: tree.index('id="clusters"')]
    assert "trained in 2 rounds" in tree, "growing is no round of the recipe"
    assert tree.index("<b>round1-all</b>") < tree.index("<b>ar-az</b>") < tree.index("<b>sv</b>")
    assert "grown; round 3; sv;" in tree and "expert; round 1; ar, az, bg, de;" in tree
    assert "of its own, 3\N{NO-BREAK SPACE}M with those of its ancestors" in tree


def test_a_run_without_rounds_says_nothing_of_them(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    page = render_page(load_run(run_maker(tmp_path / "run", 4, 2, lines=3)), {})
    assert "rounds" not in page[page.index('id="lineage"') : page.index('id="clusters"')] and "; round 1;" not in page


def test_curves_are_found_where_the_lineage_says_and_begin_after_all_ancestors(run: Path) -> None:
    loaded = load_run(run)
    assert set(loaded.curves) == {"seed", "dense", "ar-az", "bg-de", "sv"}
    assert any("no training curve of round1-all" in line for line in loaded.missing)
    assert _tokens_before(loaded, "sv") == 1_048_576 + 7_000 + 524_288


def test_continued_models_are_no_experts_in_the_curves(run: Path) -> None:
    alone = draw_curves(load_run(run))
    assert alone and ">experts (3)</text>" in alone.svg and "continued" not in alone.svg and "LAPT" not in alone.caption
    lineage = json.loads((run / "lineage.json").read_text())
    lineage["experts"]["sv"] |= {"kind": "lapt", "parent": "dense"}
    (run / "lineage.json").write_text(json.dumps(lineage))
    drawing = draw_curves(load_run(run))
    assert drawing and ">experts (2)</text>" in drawing.svg and ">continued (1)</text>" in drawing.svg and "(LAPT)" in drawing.caption
