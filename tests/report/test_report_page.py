"""The page as a whole: self-contained, complete, valid, safe with odd names, honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megaxelm.errors import StageError
from megaxelm.report.load import load_run
from megaxelm.report.page import lineage_roots, render_page
from megaxelm.report.stage import build_report

VOID = {"meta", "br", "link", "img", "hr", "input", "use"}
OPTIONAL = [
    "recipe.yaml",
    "lineage.json",
    "account.json",
    "clusters/report.json",
    "corpus/manifest.json",
    "index/manifest.json",
]


class Checker(HTMLParser):
    """Collects tags with attributes, visible text and ids; records every tag that is closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.problems: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


@pytest.fixture(scope="module")
def page(full_run: Path) -> str:
    return (full_run / "report/index.html").read_text(encoding="utf-8")


def test_page_loads_nothing_from_elsewhere(page: str) -> None:
    assert "http:" not in page and "https:" not in page and "//" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert "@import" not in page
    for tag, attributes in parse(page).tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value[:60]}>"


def test_page_is_well_formed_and_its_ids_are_unique(page: str) -> None:
    checker = parse(page)
    assert checker.problems == [] and checker.stack == []
    ids = [attributes["id"] for _, attributes in checker.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def test_every_language_and_expert_is_in_table_and_figures(full_run: Path, page: str) -> None:
    run = load_run(full_run)
    figures = {name: page[page.index(f'id="figure-{name}"') :].split("</figure>")[0] for name in ("models", "heat", "tree", "corpus")}
    table = page[page.index('id="table-bits"') :].split("</table>")[0]
    for language in run.languages:
        assert f">{language.code}<" in table
        for name, figure in figures.items():
            assert f">{language.code}<" in figure, f"{language.code} in {name}"
    heat_and_panels = figures["heat"], page[page.index('id="figure-expert_curves"') :].split("</figure>")[0]
    for name in run.experts:
        assert all(f">{name}<" in figure for figure in heat_and_panels), name


def test_best_value_of_a_row_is_marked_and_no_other(full_run: Path, page: str) -> None:
    run = load_run(full_run)
    table = page[page.index('id="table-bits"') :].split("</tbody>")[0]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', table, flags=re.DOTALL)
    assert len(rows) == len(run.languages)
    for code, row in rows:
        least = min(model.bits[code] for model in run.models)
        winners = sum(model.bits[code] == least for model in run.models)
        assert row.count('class="best"') == winners
        assert f'<td class="best">{least:.3f}<' in row


def test_every_figure_is_numbered_and_captioned(page: str) -> None:
    numbers = re.findall(r"<figcaption><b>Figure (\d+)\.</b>", page)
    assert numbers == ["1", "2", "3", "4", "5", "6"] and page.count("<figure ") == 6


def test_text_in_figures_is_at_least_8_points(page: str) -> None:
    sizes = [float(size) for size in re.findall(r"<text [^>]*font(?:-size)?:[^;\"]*?([\d.]+)px", page)]
    # 1 unit of the view box is a point, since the size of the svg is given in points.
    assert len(sizes) == page.count("<text ") > 100 and min(sizes) >= 8
    assert re.search(r'<svg [^>]*width="[\d.]+pt"', page)


def test_two_builds_give_the_same_bytes(full_run: Path, page: str, tmp_path: Path) -> None:
    build_report(full_run, tmp_path)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page


def test_16_clusters_and_20_languages_fit_without_clipped_labels(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    run_maker(tmp_path / "run", 20, 16, lines=5)
    text = build_report(tmp_path / "run", tmp_path).read_text(encoding="utf-8")
    assert parse(text).problems == []
    heat = text[text.index('id="figure-heat"') :].split("</figure>")[0]
    # One number a cell, besides the labels of the axes and the colour bar.
    assert len(re.findall(r">[+−]\d\.\d\d<", heat)) >= 20 * 16


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_optional_input_is_named(run_maker: Callable[..., Path], tmp_path: Path, name: str) -> None:
    run_maker(tmp_path / "run", 4, 2, lines=3)
    (tmp_path / "run" / name).unlink()
    run = load_run(tmp_path / "run")
    assert [item for item in run.missing if item.startswith(name)], run.missing
    assert f"<li>{name}: " in render_page(run, {})


def test_with_nothing_but_the_results_the_page_is_made_and_says_what_it_lacks(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    for name in ("recipe.yaml", "lineage.json", "account.json"):
        (folder / name).unlink()
    for name in ("clusters", "corpus", "index", "experts"):
        shutil.rmtree(folder / name)
    text = build_report(folder, tmp_path).read_text(encoding="utf-8")
    for name in [*OPTIONAL, "experts/*/metrics.jsonl"]:
        assert f"<li>{name}: " in text
    assert "may not be a fair comparison" in text
    assert 'id="figure-models"' in text and 'id="figure-curves"' not in text and parse(text).problems == []


def test_no_tree_is_explained(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    edit(folder / "clusters/report.json", lambda report: report.update(linkage=None, language_distances_reason="xx is not in URIEL"))
    text = build_report(folder, tmp_path).read_text(encoding="utf-8")
    assert 'id="figure-tree"' not in text and "xx is not in URIEL" in text


def test_names_are_escaped_everywhere(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    evil = '<script>alert("$1$")</script>&'
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8").replace('"ar-az"', json.dumps(evil)).replace('"ar"', json.dumps(evil))
        path.write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(f"name: {evil}\n", encoding="utf-8")
    text = build_report(folder, tmp_path).read_text(encoding="utf-8")
    checker = parse(text)
    assert checker.problems == [] and "script" not in [tag for tag, _ in checker.tags]
    assert "".join(checker.text).count('<script>alert("$1$")</script>&') >= 5
    # Between dollar signs matplotlib would set a formula.
    heat = parse(text[text.index('id="figure-heat"') :].split("</figure>")[0])
    assert '<script>alert("$1$")</script>&' in "".join(heat.text)


@pytest.mark.parametrize("name", ["evaluation/results.json", *OPTIONAL[1:]])
@pytest.mark.parametrize("text", ["{", "[]", "\udcff", '{"languages": 3, "experts": 3, "models": 3, "clusters": 3, "seed_tokens": "x"}'])
def test_a_broken_file_is_an_error_that_names_it(run_maker: Callable[..., Path], tmp_path: Path, name: str, text: str) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StageError, match=re.escape(str(folder / name))):
        build_report(folder, tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_without_results_the_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"evaluation.results\.json: no such file"):
        build_report(tmp_path, tmp_path)


def test_half_a_line_of_metrics_is_left_out_and_told(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=5)
    path = folder / "experts/dense/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 60, "lo', encoding="utf-8")
    run = load_run(folder)
    assert run.curves["dense"].steps == [10, 20, 30, 40, 50]
    assert any("experts/dense/metrics.jsonl: 1 unreadable line" in item for item in run.missing)
    path.write_text("not json\n", encoding="utf-8")
    with pytest.raises(StageError, match=re.escape(str(path))):
        load_run(folder)


def test_steps_done_again_after_a_resume_are_drawn_once(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=5)
    path = folder / "experts/dense/metrics.jsonl"
    again = {"step": 40, "loss": 1.5, "tokens": 77, "tokens_per_second": 100.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n", encoding="utf-8")
    curve = load_run(folder).curves["dense"]
    assert curve.steps == [10, 20, 30, 40, 50] and curve.loss[3] == 1.5 and curve.tokens[3] == 77


def test_lineage_puts_children_under_their_parent_and_keeps_orphans(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)

    def grow(lineage: Any) -> None:
        lineage["experts"]["az"] = {"parent": "ar-az", "kind": "expert", "languages": ["az"], "tokens": 5, "steps": 1, "weights": None}
        lineage["experts"]["lost"] = {"parent": "gone", "kind": "expert"}
        lineage["experts"]["a"] = {"parent": "b", "kind": "expert"}
        lineage["experts"]["b"] = {"parent": "a", "kind": "expert"}

    edit(folder / "lineage.json", grow)
    run = load_run(folder)
    roots = lineage_roots(run.members)
    assert [(root.member.name, root.orphan) for root in roots] == [("seed", False), ("lost", True), ("a", True)]
    children = {child.member.name: child for child in roots[0].children}
    assert list(children) == ["dense", "ar-az", "bg-de"]
    assert [child.member.name for child in children["ar-az"].children] == ["az"]
    assert "its parent gone is not in this run" in render_page(run, {})


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_corpus_of_many_files_is_listed_shortly(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 4, 2, lines=3)
    files = [f"part-{number:04}.jsonl" for number in range(1000)]
    edit(folder / "corpus/manifest.json", lambda manifest: manifest.update(sources={"train": [{"kind": "files", "files": files}]}))
    text = render_page(load_run(folder), {})
    assert "part-0005.jsonl, and 994 more" in text and "part-0006" not in text
    assert "does not know the licences" in text


def test_one_language_and_one_expert(run_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_maker(tmp_path / "run", 1, 1, lines=1, dense_wins=())
    text = build_report(folder, tmp_path).read_text(encoding="utf-8")
    assert "beats the dense model (1 of 1)" in text and 'id="figure-tree"' not in text and "n/a on average" not in text
