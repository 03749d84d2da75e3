"""What the figures draw, read off the matplotlib objects and the SVG."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megaxelm.report.curves import _thin, _tokens_before, draw_curves
from megaxelm.report.data import Curve
from megaxelm.report.language_plots import cluster_of_language
from megaxelm.report.load import load_run
from megaxelm.report.plots import draw_models
from megaxelm.report.svg import figure_style, shorten, wrap


def test_members_start_where_their_ancestors_stopped(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["experts"]["az"] = {"parent": "ar-az", "kind": "expert", "tokens": 7}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    run = load_run(folder)
    starts = {name: _tokens_before(run, name) for name in run.members}
    assert starts == {"seed": 0, "dense": 1_048_576, "ar-az": 1_048_576, "bg-de": 1_048_576, "az": 1_048_576 + 524_288}


def test_without_lineage_the_branch_comes_from_the_account(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    (folder / "lineage.json").unlink()
    run = load_run(folder)
    assert _tokens_before(run, "dense") == 1_048_576 and _tokens_before(run, "seed") == 0
    with figure_style():
        drawing = draw_curves(run)
    assert drawing is not None and "after the seed's 1.05\N{NO-BREAK SPACE}M tokens" in drawing.caption


def test_a_loaded_seed_has_no_curve_and_no_branch_line(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    (folder / "experts/seed/metrics.jsonl").unlink()
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["experts"]["seed"] |= {"tokens": 0, "steps": 0}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    with figure_style():
        drawing = draw_curves(load_run(folder))
    assert drawing is not None and "dotted line" not in drawing.caption and ">branch<" not in drawing.svg


def test_a_long_training_is_averaged_and_not_cropped() -> None:
    steps = list(range(1, 9_601))
    curve = Curve(steps, [float(step) for step in steps], [float(step) for step in steps], None, None)
    tokens, loss = _thin(curve, 240)
    assert len(tokens) == len(loss) == 240
    # The mean of the means over equal groups is the mean: every line counts.
    assert loss.mean() == pytest.approx(4800.5)
    assert tokens[-1] > 9_550 and tokens[0] < 50


def test_model_figure_counts_wins_and_names_what_lies_outside(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    run = load_run(run_maker(tmp_path / "run", 8, 4, lines=3, dense_wins=("bg", "el")))
    with figure_style():
        drawing = draw_models(run)
    assert drawing is not None
    assert "in 6 of 8 languages" in drawing.caption
    assert "Equal to the own expert here, so not drawn on the left: language mixture." in drawing.caption
    assert "worst expert" in drawing.caption.split("drawn only on the right")[1]


def test_a_language_in_several_clusters_belongs_to_the_one_with_most_bytes(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    report = json.loads((folder / "clusters/report.json").read_text())
    report["clusters"][0]["languages"]["de"] = {"documents": 1, "bytes": 10}
    report["clusters"][1]["languages"]["de"] = {"documents": 1, "bytes": 20}
    (folder / "clusters/report.json").write_text(json.dumps(report))
    clusters = load_run(folder).clusters
    assert clusters is not None and cluster_of_language(clusters)["de"] == "bg-de"


def test_long_names_are_wrapped_and_shortened() -> None:
    name = "-".join(["ar", "az", "bg", "de", "el", "en", "es", "fr", "he", "hi", "ja", "ko"])
    lines = wrap(name, 13).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 14 and lines[0].startswith("ar-az") and lines[1].endswith("ko") and "…" in lines[1]
    assert wrap("en-es", 13) == "en-es"
    assert len(wrap("x" * 60, 13)) <= 14
    assert shorten("abcdefghij", 5) == "abc…j" and shorten("abc", 5) == "abc"
