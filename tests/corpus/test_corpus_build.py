"""The index stage: documents in the order of the source, in the right cluster, with an account that holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megaxelm.corpus.build import build_index, load_index_manifest, open_streams
from megaxelm.corpus.document import Document
from megaxelm.corpus.prepare import prepare_corpus, training_documents
from megaxelm.corpus.token_index import TokenIndex
from megaxelm.corpus.tokenizer import Tokenizer, build_tokenizer
from megaxelm.errors import ClusterError, CorpusError, TokenIndexError
from megaxelm.recipe import Recipe, parse_recipe

NAMES = ["even", "odd"]


def assign(documents: Sequence[Document]) -> np.ndarray:
    return np.array([int(document.id) % 2 for document in documents])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("run")
    with open(folder / "text.jsonl", "w") as file:
        for i in range(400):
            code, line = [("en", "the quick brown fox jumps over the lazy dog"), ("sw", "watu wote wamezaliwa huru na sawa")][i % 3 == 0]
            file.write(json.dumps({"id": str(i), "language": code, "text": f"{line} {i * i}\n{line[i % 9 :]}"}) + "\n")
    recipe = parse_recipe(
        {
            "name": "t",
            "corpus": {"train": str(folder / "text.jsonl"), "held_out": {"share": 0.1}},
            "clusters": {"partitioner": "language"},
            "tokenizer": {"vocab_size": 310},
        }
    )
    for name in ("corpus", "tokenizer", "index"):
        (folder / name).mkdir()
    prepare_corpus(recipe, folder / "corpus")
    build_tokenizer(recipe, folder / "corpus", folder / "tokenizer")
    build_index(recipe, folder / "corpus", folder / "tokenizer", NAMES, assign, folder / "index")
    return recipe, folder


def test_every_training_document_is_in_its_cluster_in_order(run: tuple[Recipe, Path]) -> None:
    recipe, folder = run
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for number, cluster in enumerate(NAMES):
        for language in ("en", "sw"):
            index = TokenIndex(folder / "index" / cluster / language)
            index.verify(tokenizer.vocab_size)
            expected = [
                document.text
                for document in training_documents(recipe, folder / "corpus")
                if document.language == language and int(document.id) % 2 == number
            ]
            assert [tokenizer.decode(index.document(i).tolist()) for i in range(index.num_documents)] == expected
            assert {(int(index.document(i)[0]), int(index.document(i)[-1])) for i in range(index.num_documents)} == {(1, 2)}


def test_the_manifest_counts_what_is_there(run: tuple[Recipe, Path]) -> None:
    recipe, folder = run
    manifest = load_index_manifest(folder / "index")
    assert manifest["tokenizer"] == Tokenizer.load(folder / "tokenizer").fingerprint
    documents = list(training_documents(recipe, folder / "corpus"))
    counts = [counts for languages in manifest["clusters"].values() for counts in languages.values()]
    assert sum(count["documents"] for count in counts) == len(documents)
    assert sum(count["bytes"] for count in counts) == sum(document.num_bytes for document in documents)
    streams = open_streams(folder / "index")
    assert sum(index.num_tokens for indexes in streams.values() for index in indexes) == sum(count["tokens"] for count in counts)
    assert set(counts[0]["xxh3"]) == {"bin", "idx"}


def test_streams_of_some_clusters_or_all(run: tuple[Recipe, Path]) -> None:
    _, folder = run
    assert {language: len(indexes) for language, indexes in open_streams(folder / "index").items()} == {"en": 2, "sw": 2}
    assert {language: len(indexes) for language, indexes in open_streams(folder / "index", ["odd"]).items()} == {"en": 1, "sw": 1}
    with pytest.raises(ClusterError, match="no cluster third; it has even, odd"):
        open_streams(folder / "index", ["third"])


def test_files_that_were_mixed_up_are_found(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, folder = run
    import shutil

    shutil.copytree(folder / "index", tmp_path / "index")
    for ending in ("bin", "idx"):
        shutil.copyfile(tmp_path / "index" / "odd" / f"sw.{ending}", tmp_path / "index" / "odd" / f"en.{ending}")
    with pytest.raises(TokenIndexError, match="mixed up"):
        open_streams(tmp_path / "index", ["odd"])
    (tmp_path / "index" / "manifest.json").write_text("{")
    with pytest.raises(TokenIndexError, match="manifest.json"):
        open_streams(tmp_path / "index")


def test_a_cluster_without_documents_is_an_error(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = run
    with pytest.raises(ClusterError, match=r"no document was assigned to cluster third.*lower clusters.k"):
        build_index(recipe, folder / "corpus", folder / "tokenizer", [*NAMES, "third"], assign, tmp_path)


def test_a_number_outside_of_the_clusters_is_an_error(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = run
    with pytest.raises(ClusterError, match="was assigned to cluster 1; there are 0..0"):
        build_index(recipe, folder / "corpus", folder / "tokenizer", ["even"], assign, tmp_path)


def test_a_source_that_changed_between_the_passes_is_an_error(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = run
    source = folder / "text.jsonl"
    before = source.read_bytes()
    try:
        source.write_bytes(before + b'{"id": "401", "language": "sw", "text": "maandishi mapya kabisa ya leo"}\n')
        with pytest.raises(CorpusError, match="the source has changed since"):
            build_index(recipe, folder / "corpus", folder / "tokenizer", NAMES, assign, tmp_path)
    finally:
        source.write_bytes(before)
