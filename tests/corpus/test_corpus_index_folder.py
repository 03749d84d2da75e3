"""The index folder: a manifest that is true, and the commands that look at what it names."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megaxelm.cli import app
from megaxelm.corpus import index_stats as stats_module
from megaxelm.corpus.index_folder import (
    check_tokenizer,
    load_index_manifest,
    merged_vocab_size,
    open_each,
    open_one,
    open_streams,
    verify_index,
    write_manifest,
)
from megaxelm.corpus.index_stats import IndexStats, index_stats, print_stats
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.errors import ClusterError, MegaxelmError, TokenIndexError

TOKENIZER: Any = SimpleNamespace(name="Unigram, 100 pieces", fingerprint="aaaa", vocab_size=100)
OTHER: Any = SimpleNamespace(name="BPE, 100 pieces", fingerprint="bbbb", vocab_size=100)
TEXTS = {"north": {"en": [[1, 50, 2], [1, 60, 61, 2]], "sw": [[1, 70, 2]]}, "south": {"en": [[1, 51, 52, 53, 2]]}}


def write_indexes(folder: Path) -> dict[str, dict[str, Any]]:
    clusters: dict[str, dict[str, Any]] = {}
    for cluster, languages in TEXTS.items():
        (folder / cluster).mkdir(parents=True)
        clusters[cluster] = {}
        for language, documents in languages.items():
            writer = TokenIndexWriter(folder / cluster / language, TOKENIZER.vocab_size)
            for document in documents:
                writer.add(document)
            counts = {"documents": writer.num_documents, "tokens": writer.num_tokens, "bytes": 10 * writer.num_documents}
            clusters[cluster][language] = counts | {"xxh3": writer.close()}
    return clusters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    write_manifest(folder, TOKENIZER, "cccc", write_indexes(folder))
    return folder


def change_manifest(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def command(*words: str | Path) -> tuple[str, str]:
    """What a command printed to stdout and stderr; the user's mistakes are raised."""
    result = CliRunner().invoke(app, ["index", *map(str, words)])
    if isinstance(result.exception, MegaxelmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_the_manifest_says_what_the_index_was_made_from_and_holds(folder: Path) -> None:
    manifest = load_index_manifest(folder)
    assert manifest["tokenizer"] == {"name": "Unigram, 100 pieces", "fingerprint": "aaaa"}
    assert (manifest["vocab_size"], manifest["clusters_fingerprint"], manifest["verified"]) == (100, "cccc", True)
    counts = manifest["clusters"]["north"]["en"]
    assert (counts["documents"], counts["tokens"], counts["bytes"]) == (2, 7, 20)
    assert len(list(verify_index(folder, TOKENIZER, "cccc"))) == 3


def test_no_manifest_is_written_over_an_index_of_another_size(tmp_path: Path) -> None:
    clusters = write_indexes(tmp_path)
    clusters["south"]["en"]["tokens"] += 1
    with pytest.raises(TokenIndexError, match="south/en has 1 documents and 5 tokens, its manifest says 1 and 6"):
        write_manifest(tmp_path, TOKENIZER, "cccc", clusters)
    assert not (tmp_path / "manifest.json").exists()


def test_streams_of_some_clusters_or_all(folder: Path) -> None:
    assert {language: len(indexes) for language, indexes in open_streams(folder).items()} == {"en": 2, "sw": 1}
    assert {language: len(indexes) for language, indexes in open_streams(folder, ["south"], TOKENIZER).items()} == {"en": 1}
    with pytest.raises(ClusterError, match="no cluster third; it has north, south"):
        open_streams(folder, ["third"])


def test_an_index_of_another_tokenizer_is_refused_naming_both(folder: Path) -> None:
    for call in (
        lambda: open_streams(folder, None, OTHER),
        lambda: list(verify_index(folder, OTHER)),
        lambda: check_tokenizer(folder, OTHER),
    ):
        with pytest.raises(TokenIndexError, match=r"`Unigram, 100 pieces` \(aaaa\), the run has `BPE, 100 pieces` \(bbbb\)"):
            call()


def test_an_index_of_other_clusters_is_not_verified(folder: Path) -> None:
    with pytest.raises(TokenIndexError, match="clusters cccc, and the run's are now dddd"):
        list(verify_index(folder, TOKENIZER, "dddd"))


def test_files_that_were_mixed_up_or_changed_are_found(folder: Path) -> None:
    for ending in ("bin", "idx"):
        shutil.copyfile(folder / "north" / f"sw.{ending}", folder / "north" / f"en.{ending}")
    with pytest.raises(TokenIndexError, match="mixed up"):
        open_streams(folder, ["north"])
    assert open_streams(folder, ["south"])
    path = folder / "south" / "en.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x03\x00")
    lines = verify_index(folder)
    with pytest.raises(TokenIndexError, match=r"mixed up"):
        next(lines)


def test_one_changed_token_is_found_by_its_hash(folder: Path) -> None:
    path = folder / "south" / "en.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x03\x00")
    lines = verify_index(folder)
    assert next(lines) == "north/en: 2 documents, 7 tokens, sound"
    assert next(lines).startswith("north/sw")
    with pytest.raises(TokenIndexError, match=r"south/en\.bin: changed since it was written"):
        next(lines)


@pytest.mark.parametrize(
    "fields",
    [
        {"clusters": {}},
        {"clusters": {"north": []}},
        {"clusters": {"north": {"en": {"documents": 2, "tokens": 7, "bytes": 20}}}},
        {"clusters": {"north": {"en": {"documents": "2", "tokens": 7, "bytes": 20, "xxh3": {"bin": "", "idx": ""}}}}},
        {"tokenizer": "aaaa"},
        {"tokenizer": {"fingerprint": "aaaa"}},
        {"vocab_size": None},
        {"clusters_fingerprint": 3},
    ],
)
def test_a_damaged_manifest_is_told(folder: Path, fields: dict[str, Any]) -> None:
    change_manifest(folder, **fields)
    with pytest.raises(TokenIndexError, match=r"manifest\.json: .*--from"):
        load_index_manifest(folder)


def test_a_manifest_that_is_missing_or_cut_is_told(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:30])
    with pytest.raises(TokenIndexError, match=r"manifest\.json: damaged"):
        open_streams(folder)
    path.unlink()
    with pytest.raises(TokenIndexError, match=r"manifest\.json: no such file"):
        open_streams(folder)


def test_figures_of_an_index_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "_CHUNK", 16)
    lengths = np.random.default_rng(0).integers(1, 60, 101)
    with TokenIndexWriter(tmp_path / "x", 10) as writer:
        writer.add_many(np.ones(lengths.sum(), np.int64), lengths)
    stats = index_stats(TokenIndex(tmp_path / "x"), "x", num_bytes=1000)
    assert (stats.documents, stats.tokens, stats.mean_length) == (101, lengths.sum(), pytest.approx(lengths.mean()))
    for percent, length in stats.length_percentiles.items():
        assert length == np.percentile(lengths, percent, method="inverted_cdf")
    assert stats.bytes_per_token == pytest.approx(1000 / lengths.sum())


def test_an_index_without_documents_has_figures(tmp_path: Path) -> None:
    with TokenIndexWriter(tmp_path / "x", 10):
        pass
    stats = index_stats(TokenIndex(tmp_path / "x"), "x", 0)
    assert stats == IndexStats("x", 0, 0, 0, 0.0, {}) and stats.bytes_per_token is None
    out = StringIO()
    print_stats([stats], out)
    assert "nan" not in out.getvalue()


def test_stats_prints_every_index_in_whole_numbers(folder: Path) -> None:
    out, _ = command("stats", folder)
    row = next(line.split() for line in out.splitlines() if "north/en" in line)
    assert row == ["north/en", "2", "7", "20", "2.86", "3.5", "3", "3", "3", "4", "4"]
    rows = [json.loads(line) for line in command("stats", folder, "--json")[0].splitlines()]
    assert [row["name"] for row in rows] == ["north/en", "north/sw", "south/en"]
    assert rows[0]["length_percentiles"]["95"] == 4 and rows[0]["bytes_per_token"] == pytest.approx(20 / 7)
    plain = json.loads(command("stats", folder / "south" / "en", "--json")[0])
    assert (plain["tokens"], plain["num_bytes"], plain["bytes_per_token"]) == (5, None, None)


def test_peek_prints_the_documents_asked_for(folder: Path) -> None:
    out, warning = command("peek", folder, "north/en", "--document", "1")
    assert out == "document 1, 4 tokens: 1 60 61 2\n" and "no tokenizer lies beside" in warning
    out, _ = command("peek", folder / "north" / "en", "--count", "9")
    assert out.splitlines() == ["document 0, 3 tokens: 1 50 2", "document 1, 4 tokens: 1 60 61 2"]
    with pytest.raises(TokenIndexError, match="document 2 does not exist; there are 2"):
        command("peek", folder, "north/en", "--document", "2")
    with pytest.raises(TokenIndexError, match="has no index east/en; it has north/en, north/sw, south/en".replace("east/en", "'east/en'")):
        command("peek", folder, "east/en")
    with pytest.raises(TokenIndexError, match="name one of its indexes"):
        command("peek", folder)
    with pytest.raises(TokenIndexError, match="is one index, not"):
        command("peek", folder / "north" / "en", "north/en")


def test_verify_takes_a_folder_or_a_plain_prefix(folder: Path) -> None:
    assert len(command("verify", folder)[0].splitlines()) == 3
    assert "1 documents, 5 tokens, sound" in command("verify", folder / "south" / "en")[0]
    (folder / "south" / "en.bin").write_bytes(b"\0" * 12)
    with pytest.raises(TokenIndexError, match="has 12 bytes"):
        command("verify", folder / "south" / "en")
    with pytest.raises(MegaxelmError):
        command("verify", folder / "nothing")


def test_merge_joins_indexes_of_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    out, _ = command("merge", tmp_path / "en", folder / "north" / "en", folder / "south" / "en")
    assert "3 documents, 12 tokens of 2 indexes" in out
    index = TokenIndex(tmp_path / "en")
    assert [index.document(i).tolist() for i in range(3)] == [*TEXTS["north"]["en"], *TEXTS["south"]["en"]]
    other = tmp_path / "other" / "index"
    write_manifest(other, OTHER, "cccc", write_indexes(other))
    with pytest.raises(TokenIndexError, match=r"`Unigram, 100 pieces` \(aaaa\) and .*`BPE, 100 pieces` \(bbbb\)"):
        command("merge", tmp_path / "both", folder / "north" / "en", other / "north" / "en")
    with pytest.raises(TokenIndexError, match="the vocabulary is 0..59"):
        command("merge", tmp_path / "both", folder / "north" / "en", "--vocab-size", "60")
    assert merged_vocab_size([folder / "north" / "en"]) == 100 and merged_vocab_size([tmp_path / "en"]) is None


def test_each_index_has_its_name_and_its_bytes(folder: Path) -> None:
    assert [(name, index.num_documents, num_bytes) for name, index, num_bytes in open_each(folder)] == [
        ("north/en", 2, 20),
        ("north/sw", 1, 10),
        ("south/en", 1, 10),
    ]
    assert open_one(folder, "south/en").num_tokens == 5
