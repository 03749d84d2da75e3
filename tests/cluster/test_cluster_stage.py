"""The TF-IDF partitioner, and the stage `clusters` from a corpus folder to its report."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaxelm.cluster.kmeans import squared_distances
from megaxelm.cluster.load import load_partitioner
from megaxelm.cluster.tfidf import TfidfPartitioner, equal_shares, stratified_sample
from megaxelm.corpus.document import Document
from megaxelm.errors import ClusterError, MegaxelmError
from megaxelm.recipe import Recipe, TfidfConfig, parse_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages

WORDS = {
    "de": "der Hund und die Katze sitzen auf einer Matte vor dem Haus mit Garten",
    "el": "ο σκύλος και η γάτα κάθονται στο χαλί μπροστά στο σπίτι με κήπο",
    "hi": "बिल्ली और कुत्ता घर के सामने चटाई पर बैठे हैं बगीचा",
    "sw": "mbwa na paka wanakaa juu ya mkeka mbele ya nyumba yenye bustani",
}


class Characters:
    """A stand-in for the tokenizer: one token a character."""

    fingerprint = "characters"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]


def some_documents(code: str, count: int) -> list[Document]:
    rng = random.Random(code)
    words = WORDS.get(code, WORDS["de"]).split()
    return [Document(text=" ".join(rng.choices(words, k=12)), id=f"{code}/{number}", language=code) for number in range(count)]


def write_corpus(folder: Path, counts: dict[str, int]) -> Path:
    """`train.jsonl`, and a held-out document of every language in `valid.jsonl`."""
    folder.mkdir(parents=True)
    for name in ("train", "valid"):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for code, count in counts.items():
                for document in some_documents(code, count) if name == "train" else [Document(f"held out {code}", code, code)]:
                    file.write(json.dumps({"id": document.id, "language": code, "text": document.text}, ensure_ascii=False) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer that knows the characters of all the words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = recipe(write_corpus(folder / "text", dict.fromkeys(WORDS, 40)), partitioner="language")
    Stages(RunFolder(folder / "run"), made, say=lambda text: None).run(until="tokenizer")
    return folder / "run" / "tokenizer"


def recipe(folder: Path, tokenizer: Path | None = None, **clusters: Any) -> Recipe:
    tree = {
        "name": "t",
        "corpus": {"train": str(folder / "train.jsonl"), "valid": str(folder / "valid.jsonl")},
        "tokenizer": {"load": str(tokenizer)} if tokenizer else {"vocab_size": 400},
        "clusters": clusters,
        "train": {"batch_sequences": 4 * (clusters.get("k") or 1)},
    }
    return parse_recipe(tree)


def build(tmp_path: Path, tokenizer: Path, counts: dict[str, int], **clusters: Any) -> dict[str, Any]:
    made = recipe(write_corpus(tmp_path / "text", counts), tokenizer, **clusters)
    Stages(RunFolder(tmp_path / "run"), made, say=lambda text: None).run(until="clusters")
    report: dict[str, Any] = json.loads((tmp_path / "run" / "clusters" / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize("analyzer", ["char", "subword"])
def test_tfidf_finds_the_languages_and_keeps_new_documents_apart(analyzer: str, tmp_path: Path) -> None:
    partitioner = TfidfPartitioner(4, TfidfConfig(analyzer=analyzer, dimensions=8), 0, Characters())
    partitioner.fit(document for code in WORDS for document in some_documents(code, 12))
    assert partitioner.names == ["c00", "c01", "c02", "c03"] and partitioner.languages() is None
    new = [document for code in WORDS for document in some_documents(code, 20)[12:]]
    clusters = partitioner.assign(new).reshape(4, 8)
    assert (clusters == clusters[:, :1]).all() and len(set(clusters[:, 0])) == 4
    nearest = squared_distances(partitioner.space.transform([d.text for d in new]), partitioner.centres).argmin(axis=1)
    assert (nearest == clusters.ravel()).all()

    partitioner.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partitioner.json", "partitioner.safetensors"]
    loaded = load_partitioner(tmp_path, Characters())
    assert (loaded.names, loaded.describe(), loaded.notes()) == (partitioner.names, partitioner.describe(), partitioner.notes())
    assert (loaded.assign(new) == clusters.ravel()).all()


def test_damaged_tfidf_files_are_cluster_errors(tmp_path: Path) -> None:
    partitioner = TfidfPartitioner(2, TfidfConfig(analyzer="char", dimensions=4), 0)
    partitioner.fit(some_documents("de", 6) + some_documents("el", 6))
    partitioner.save(tmp_path)
    settings_path, arrays_path = tmp_path / "partitioner.json", tmp_path / "partitioner.safetensors"
    text, arrays = settings_path.read_text(), arrays_path.read_bytes()
    settings = json.loads(text)
    for damaged in [
        settings | {"names": ["c00"]},
        settings | {"space": {}},
        settings | {"config": {"dimension": 4}},
        settings | {"kind": "pickle"},
    ]:
        settings_path.write_text(json.dumps(damaged))
        with pytest.raises(ClusterError, match="partitioner.json: damaged"):
            load_partitioner(tmp_path)
    settings_path.write_text(text)
    for length in [0, 7, 200, len(arrays) - 1]:
        arrays_path.write_bytes(arrays[:length])
        with pytest.raises(ClusterError, match="partitioner"):
            load_partitioner(tmp_path)
    arrays_path.unlink()
    with pytest.raises(ClusterError, match="missing entry"):
        load_partitioner(tmp_path)


def test_k_above_the_documents_is_an_error() -> None:
    with pytest.raises(ClusterError, match=r"clusters\.k = 5: more than the 4 documents"):
        TfidfPartitioner(5, TfidfConfig(analyzer="char"), 0).fit(some_documents("de", 4))


def test_sample_takes_equal_shares_as_far_as_there_are_documents() -> None:
    assert equal_shares({"a": 2, "b": 100, "c": 100}, 30) == {"a": 2, "b": 14, "c": 14}
    assert equal_shares({"a": 2, "b": 3}, 30) == {"a": 2, "b": 3}
    documents = some_documents("de", 50) + some_documents("sw", 3)
    sample = stratified_sample(documents, 20, seed=1)
    assert [document.language for document in sample] == ["de"] * 17 + ["sw"] * 3
    assert len({document.id for document in sample}) == 20
    assert sample == stratified_sample(documents, 20, seed=1) != stratified_sample(documents, 20, seed=2)


def test_typology_stage_reports_clusters_counts_and_dendrogram(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"de": 5, "el": 4, "en": 6, "es": 3, "sw": 2, "vi": 1}
    report = build(tmp_path, tokenizer, counts, partitioner="typology", k=3)
    assert (report["partitioner"], report["k"], report["method"]) == ("typology", 3, "paired")
    assert report["names"] == ["de-el", "en-es", "sw-vi"]
    assert report["languages"] == sorted(counts)
    assert {code: found["documents"] for c in report["clusters"] for code, found in c["languages"].items()} == counts
    greek = next(c for c in report["clusters"] if c["name"] == "de-el")["languages"]["el"]
    assert greek["bytes"] == sum(document.num_bytes for document in some_documents("el", 4))
    assert [c["forced"] for c in report["clusters"]] == [False, False, True]
    assert np.shape(report["language_distances"]) == (6, 6) and np.shape(report["linkage"]) == (5, 4)
    assert len(report["merges"]) == 3
    printed = capsys.readouterr().out
    assert "sw and vi are a left-over pair, not relatives" in printed and "de-el" in printed
    assert load_partitioner(tmp_path / "run" / "clusters").names == report["names"]


def test_tfidf_stage_reports_languages_of_each_cluster(tmp_path: Path, tokenizer: Path) -> None:
    report = build(tmp_path, tokenizer, {"de": 8, "sw": 8}, partitioner="tfidf", k=2, tfidf={"analyzer": "subword"})
    assert report["method"] == "tfidf" and report["merges"] == []
    assert sorted(c["languages"] and next(iter(c["languages"])) for c in report["clusters"]) == ["de", "sw"]
    assert any("clusters.tfidf.dimensions = 100" in note for note in report["notes"])


def test_a_code_that_uriel_lacks_leaves_the_distances_out_and_says_why(tmp_path: Path, tokenizer: Path) -> None:
    report = build(tmp_path, tokenizer, {"de": 2, "xx-new": 2}, partitioner="language")
    assert report["names"] == ["de", "xx-new"] and report["k"] == 2
    assert report["language_distances"] is None and report["linkage"] is None
    assert "'xx-new'" in report["language_distances_reason"]


@pytest.mark.parametrize(
    ("counts", "clusters", "message"),
    [
        ({"de": 2, "sw": 2}, {"partitioner": "typology", "k": 3}, r"clusters\.k = 3: more than the 2 languages"),
        ({"de": 2, "xq": 2}, {"partitioner": "typology", "k": 2}, "language 'xq'"),
        ({"de": 2, "sw": 2}, {"partitioner": "language", "k": 3}, "2 languages"),
        ({"de": 2, "sw": 2}, {"partitioner": "tfidf", "k": 5}, "more than the 4 documents"),
    ],
)
def test_what_cannot_be_divided_is_an_error(
    counts: dict[str, int], clusters: dict[str, Any], message: str, tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(MegaxelmError, match=message):
        build(tmp_path, tokenizer, counts, **clusters)
    assert not (tmp_path / "run" / "clusters").exists()


def test_the_report_page_stands_beside_the_report(tmp_path: Path, tokenizer: Path) -> None:
    report = build(tmp_path, tokenizer, {"de": 30, "sw": 30}, partitioner="tfidf", k=2, tfidf={"analyzer": "char", "dimensions": 8})
    assert report["stability"] and report["balance"]["tokens"]
    page = (tmp_path / "run" / "clusters" / "report.html").read_text(encoding="utf-8")
    assert "c00" in page and "c01" in page
