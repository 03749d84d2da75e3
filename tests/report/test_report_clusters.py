"""The page of the clusters: complete, self-contained, safe with odd text, honest about what is not known."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

from megaxelm.errors import StageError
from megaxelm.report.clusters import write_cluster_page

VOID = {"meta", "br", "use"}
CODES = ["ar", "az", "bg", "de", "el", "en", "es", "fr", "he", "hi", "ja", "ko", "pl", "ru", "sv", "sw", "tr", "ur", "vi", "zh"]


def make_report(k: int = 4, num_languages: int = 6, points: int = 60) -> dict[str, Any]:
    """A report as the stage `clusters` writes it; the last cluster has no document where there is more than one."""
    random = np.random.default_rng(2)
    codes = CODES[:num_languages]
    filled = max(1, k - 1)
    clusters: list[dict[str, Any]] = [{"name": f"c{number:02d}", "languages": {}, "forced": False} for number in range(k)]
    for number, code in enumerate(codes):
        size = {"documents": 100 + number, "bytes": 90_000 + number, "tokens": 20_000 + number}
        clusters[number % filled]["languages"][code] = size
    compared = {"documents": 500, "classes": 3, "purity": 0.7, "purity_of_one_cluster": 0.4, "nmi": 0.61, "explained": 0.83}
    balance = {"largest_to_mean": 1.5, "smallest_to_mean": 0.0, "entropy_bits": 1.4, "effective_clusters": 2.6}
    term = {"term": "بيت", "share": 0.6, "expected": 0.1, "z": 9.1}
    shown = {"id": "a/1", "language": "ar", "domain": "news", "distance": 0.2, "text": "هذا نص عربي قصير"}
    return {
        "partitioner": "tfidf",
        "k": k,
        "method": "tfidf",
        "names": [item["name"] for item in clusters],
        "clusters": clusters,
        "languages": codes,
        "language_distances": None,
        "linkage": linkage(random.random((num_languages, 3)), "average").tolist() if num_languages > 1 else None,
        "merges": [],
        "description": {},
        "notes": ["a note of the partitioner"],
        "balance": {unit: {"total": 1000 + len(unit), **balance} for unit in ("documents", "bytes", "tokens")},
        "agreement": {
            "language": compared,
            "domain_field": "domain",
            "sample": 700,
            "domain": {**compared, "nmi": 0.13, "chance": 0.02},
            "language_in_sample": {**compared, "chance": 0.01},
            "language_and_domain": 0.2,
        },
        "kind": "languages",
        "sentence": "The clusters are languages: so it stands here.",
        "domains": {"names": ["news", "law"], "documents": [[5, 1]] * k, "other_names": 7, "other_documents": [2] * k},
        "stability": {"reason": None, "seeds": [3, 4], "adjusted_rand": [[1.0, 0.77], [0.77, 1.0]], "mean": 0.77, "least": 0.77},
        "typical_terms": {
            "documents": 700,
            "characters": 1000,
            "overall": [[term] if number < filled else [] for number in range(k)],
            "within_languages": [[] for _ in range(k)],
        },
        "typical_documents": [[shown] if number < filled else [] for number in range(k)],
        "picture": {
            "method": "t-SNE",
            "documents": points,
            "sample": 700,
            "x": random.random(points).round(4).tolist(),
            "y": random.random(points).round(4).tolist(),
            "cluster": [number % filled for number in range(points)],
            "languages": codes,
            "language": [number % num_languages for number in range(points)],
        },
    }


class Checker(HTMLParser):
    """Collects tags, visible text and what is closed in the wrong order; the text of elements with `dir` apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.text: list[str] = []
        self.isolated: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.stack or self.stack.pop()[0] != tag):
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.stack and (self.stack[-1][0] == "bdi" or self.stack[-1][1].get("dir") == "auto"):
            self.isolated.append((self.stack[-1][1].get("lang") or "", data))


def write(folder: Path, report: dict[str, Any]) -> tuple[str, Checker]:
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    page = write_cluster_page(folder)
    assert page == folder / "report.html"
    text = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.problems == [] and checker.stack == []
    ids = [attributes["id"] for _, attributes in checker.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    return text, checker


def figure(text: str, name: str) -> str:
    return text[text.index(f'id="figure-{name}"') :].split("</figure>")[0]


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    text, checker = write(tmp_path, make_report())
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not {tag for tag, _ in checker.tags} & {"script", "link", "iframe", "img", "object", "embed", "base"}
    for _, attributes in checker.tags:
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))


def test_everything_that_was_measured_stands_in_the_page(tmp_path: Path) -> None:
    report = make_report()
    report["typical_terms"]["within_languages"][1] = [{"term": "只有", "share": 0.6, "expected": 0.1, "z": 9.1}]
    text, checker = write(tmp_path, report)
    said = " ".join(" ".join(checker.text).split())
    for words in (
        "The clusters are languages: so it stands here.",
        "a note of the partitioner",
        "0.61 NMI with language",
        "0.13 NMI with domain",
        "0.77 Rand index between seeds",
        "1.50 tokens, largest / mean",
        "Mean 0.77, least 0.77",
        "60 of the 700 documents of the sample, drawn at random",
        "Beyond its languages: 只有",
        "ar, news, a/1",
    ):
        assert words in said, words
    assert [number for number in re.findall(r"<b>Figure (\d)\.</b>", text)] == ["1", "2", "3", "4", "5", "6"]
    for name in ("shares", "picture_clusters", "picture_panels", "tree"):
        assert "c00" in figure(text, name), name
    for code in report["languages"]:
        assert all(f">{code}<" in figure(text, name) for name in ("shares", "picture_languages", "tree")), code
    assert all(f">{name}<" in figure(text, "domains") for name in ("news", "law", "7 others"))


def test_tables_hold_documents_bytes_and_tokens_of_every_pair(tmp_path: Path) -> None:
    text, _ = write(tmp_path, make_report(k=3, num_languages=3))
    for unit, cells in {"documents": ["100", "102"], "bytes": ["90,000", "90,002"], "tokens": ["20,000", "20,002"]}.items():
        table = text[text.index(f'id="table-{unit}"') :].split("</table>")[0]
        rows = {name: re.findall("<td>(.*?)</td>", row) for name, row in re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', table)}
        # Languages go to the first two clusters in turn; the third is empty.
        assert rows["ar"] == [cells[0], "", "", cells[0]] and rows["bg"] == [cells[1], "", "", cells[1]]
        assert rows["az"][0] == "" and rows["az"][1] == rows["az"][3] != ""


def test_cells_of_the_heat_map_are_shares_of_the_row(tmp_path: Path) -> None:
    report = make_report(k=3, num_languages=2)
    size = {"documents": 1, "bytes": 1}
    for cluster, tokens in zip(report["clusters"], (620, 379, 1), strict=True):
        cluster["languages"] = {"ar": {**size, "tokens": tokens}}
    text, _ = write(tmp_path, report)
    cells = re.findall(r">(\d+|·)</text>", figure(text, "shares"))
    assert cells == ["62", "38", "·"]


def test_text_of_documents_cannot_act_on_the_page(tmp_path: Path) -> None:
    evil = '<script>alert("$1$")</script>&amp;'
    report = make_report()
    report["typical_documents"][0][0].update(text=evil, id=evil, domain=evil)
    report["typical_terms"]["overall"][0][0]["term"] = evil
    report["domains"]["names"][0] = evil
    report["notes"] = [evil]
    report["sentence"] = evil
    report["clusters"][0]["name"] = report["names"][0] = evil
    _, checker = write(tmp_path, report)
    assert "script" not in {tag for tag, _ in checker.tags}
    said = "".join(checker.text)
    assert said.count(evil) >= 7


def test_text_keeps_its_own_direction(tmp_path: Path) -> None:
    _, checker = write(tmp_path, make_report())
    assert ("ar", "هذا نص عربي قصير") in checker.isolated and ("", "بيت") in checker.isolated
    right_to_left = [part for part in checker.text if re.search("[\u0590-\u06ff]", part)]
    assert len(right_to_left) == len([part for _, part in checker.isolated if re.search("[\u0590-\u06ff]", part)])


def test_an_empty_cluster_is_said_to_be_empty(tmp_path: Path) -> None:
    text, _ = write(tmp_path, make_report(k=4))
    table = text[text.index('id="table-clusters"') :].split("</table>")[0]
    assert table.count("no document") == 1 and "no document" in table[table.index("c03") :]
    section = text[text.index('id="cluster-3"') :].split("</section>")[0]
    assert "No document of the corpus" in section and "No document of the sample" in section and "no term stands out" in section


def test_one_cluster_and_one_language_make_a_page(tmp_path: Path) -> None:
    report = make_report(k=1, num_languages=1, points=1)
    report["agreement"]["language"].update(nmi=None, explained=None)
    report["kind"], report["sentence"] = "unknown", "All documents are in one cluster."
    report["stability"] = {
        "reason": "one cluster is the same with every seed",
        "seeds": [],
        "adjusted_rand": None,
        "mean": None,
        "least": None,
    }
    text, checker = write(tmp_path, report)
    said = "".join(checker.text)
    assert "Not applicable: one cluster is the same with every seed." in said and "there is one language" in said
    assert "figure-tree" not in text and "figure-picture_panels" not in text and "n/aNMI with language" in said


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    report = make_report()
    report["agreement"].update(domain=None, language_in_sample=None, language_and_domain=None, domain_reason="no document has 'domain'")
    report.update(domains=None, picture=None, typical_documents=None, linkage=None, language_distances_reason="xx is not in URIEL")
    text, checker = write(tmp_path, report)
    said = "".join(checker.text)
    for words in ("Domains are not compared: no document has 'domain'.", "There is no picture", "xx is not in URIEL", "n/aNMI with domain"):
        assert words in said, words
    assert said.count("Typical documents are not known") == 4
    assert re.findall(r'<figure id="figure-(\w+)"', text) == ["shares"]


def test_an_empty_corpus_of_counts_has_no_shares(tmp_path: Path) -> None:
    report = make_report()
    for cluster in report["clusters"]:
        cluster["languages"] = {}
    report["balance"] = {
        unit: {"total": 0, "largest_to_mean": None, "smallest_to_mean": None, "entropy_bits": None, "effective_clusters": None}
        for unit in ("documents", "bytes", "tokens")
    }
    _, checker = write(tmp_path, report)
    assert "".join(checker.text).count("no document") == 4


@pytest.mark.parametrize("k", [16, 32])
def test_many_clusters_fit_and_every_label_is_there(tmp_path: Path, k: int) -> None:
    report = make_report(k=k, num_languages=20, points=320)
    text, _ = write(tmp_path, report)
    width = float(re.findall(r'<svg [^>]*width="([\d.]+)pt"', figure(text, "shares"))[0])
    # The column of the page is 60 rem less its margins: 921 CSS pixels.
    assert width * 96 / 72 <= 921
    for name in report["names"][:-1]:
        assert f">{name}<" in figure(text, "picture_clusters") and f">{name} (" in figure(text, "picture_panels"), name
    assert len(text) < 1_300_000


def test_labels_of_a_picture_do_not_cover_each_other(tmp_path: Path) -> None:
    report = make_report(k=17, num_languages=20, points=640)
    text, _ = write(tmp_path, report)
    places = re.findall(
        r'<g transform="translate\(([\d.]+) ([\d.]+)\)[^>]*>\s*<text|<text [^>]*x="([\d.]+)" y="([\d.]+)"', figure(text, "picture_clusters")
    )
    found = [(float(a or c), float(b or d)) for a, b, c, d in places]
    assert len(set(found)) >= 16
    distinct = sorted(set(found))
    for number, (x, y) in enumerate(distinct):
        for left, low in distinct[number + 1 :]:
            assert abs(x - left) >= 14 or abs(y - low) >= 8, ((x, y), (left, low))


def test_the_page_is_the_same_again(tmp_path: Path) -> None:
    report = make_report()
    assert write(tmp_path, report)[0] == write(tmp_path, report)[0]


def _drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda report: report.pop(key)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (_drop("balance"), "balance"),
        (_drop("picture"), "picture"),
        (lambda report: report["clusters"][1]["languages"]["az"].pop("tokens"), r"clusters\.1\.languages\.az\.tokens"),
        (lambda report: report["typical_terms"]["overall"].pop(), r"typical_terms\.overall.* 3 entries for 4 clusters"),
        (lambda report: report["picture"]["x"].pop(), "one entry for each of the 60 documents"),
        (lambda report: report["linkage"].pop(), "linkage"),
        (lambda report: report["balance"].pop("tokens"), "balance.* lacks tokens"),
        (lambda report: report["picture"]["cluster"].__setitem__(0, 9), "cluster 9"),
        (lambda report: report["picture"]["language"].__setitem__(0, 6), "language 6"),
        (lambda report: report["picture"]["x"].__setitem__(0, float("nan")), "picture.x"),
    ],
)
def test_a_broken_report_is_an_error_that_names_file_and_place(tmp_path: Path, change: Callable[..., Any], place: str) -> None:
    report = copy.deepcopy(make_report())
    change(report)
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(StageError, match=place) as caught:
        write_cluster_page(tmp_path)
    assert str(tmp_path / "report.json") in str(caught.value) and "--only clusters" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_a_report_that_is_absent_or_no_json_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(StageError, match=re.escape(str(tmp_path / "report.json"))):
        write_cluster_page(tmp_path)
