"""Properties of the whole preparation under input that nobody chose: sound documents or a sentence, and the index is the corpus."""

from __future__ import annotations

import gzip
import json
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pipeline_run import prepare, write_files
from tiny_run import tiny_recipe

from megaxelm.corpus.document import text_key
from megaxelm.corpus.inputs import list_inputs
from megaxelm.corpus.readers import Row, Tally, read_rows
from megaxelm.corpus.shards import TokenShard, write_shard
from megaxelm.corpus.token_index import TokenIndex
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import CorpusError, TokenIndexError
from megaxelm.recipe import CorpusConfig, FileSource, Recipe, parse_recipe

ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"]
LANGUAGES = ("en", "sw", "ru")


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read_all(path: Path) -> list[Row]:
    """Everything in a file; reading on from each mark gives the rest."""
    source = FileSource(files=[str(path)])
    corpus = CorpusConfig(train=[source], max_bad_share=1.0)
    (item,) = list_inputs([source])
    tally = Tally(item.name, corpus)
    rows = list(read_rows(item, source, tally))
    assert tally.total - tally.broken == len(rows)
    for text in (*tally.examples, *(row.text for row in rows), *(row.language for row in rows), *(row.id or "" for row in rows)):
        text.encode("utf-8")
    assert all(row.text and not row.text.isspace() for row in rows)
    for number, row in enumerate(rows[:4]):
        assert list(read_rows(item, source, Tally(item.name, corpus), row.mark)) == rows[number:]
    return rows


def packed(rows: list[dict[str, Any]], ending: str) -> bytes:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
        return bytes(sink.getvalue().to_pybytes())
    if ending == "txt":
        return "\n".join(row["text"] for row in rows).encode()
    return {"jsonl": data, "jsonl.gz": gzip.compress(data), "jsonl.zst": zstandard.ZstdCompressor().compress(data)}[ending]


SOUND = [{"id": f"d{i}", "language": LANGUAGES[i % 3], "text": f"text {i} \u00e9\u6f22" * (i % 4 + 1), "n": i} for i in range(30)]


@given(data=st.binary(max_size=200), ending=st.sampled_from(ENDINGS))
@settings(max_examples=80, deadline=None)
def test_bytes_that_mean_nothing_end_in_a_sentence(data: bytes, ending: str) -> None:
    with folder() as base:
        (base / f"a.{ending}").write_bytes(data)
        try:
            read_all(base / f"a.{ending}")
        except CorpusError as error:
            assert "a." in str(error) or "corpus" in str(error)


@given(data=st.data(), ending=st.sampled_from(ENDINGS))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_file_gives_sound_documents_or_a_sentence(data: st.DataObject, ending: str) -> None:
    whole = bytearray(packed(SOUND, ending))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip":
                whole[place] = data.draw(st.integers(0, 255))
            case "cut":
                del whole[max(place, 1) :]
            case "insert":
                whole[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case "drop":
                del whole[place : place + 5]
        if not whole:
            break
    with folder() as base:
        (base / f"a.{ending}").write_bytes(whole)
        try:
            read_all(base / f"a.{ending}")
        except CorpusError as error:
            assert "a." in str(error)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_that_was_cut_anywhere_is_never_taken_for_a_shorter_one(ending: str) -> None:
    whole = packed(SOUND, ending)
    with folder() as base:
        path = base / f"a.{ending}"
        for length in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:length])
            with pytest.raises(CorpusError):
                read_all(path)
        path.write_bytes(whole)
        assert len(read_all(path)) == len(SOUND)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "\x00", "", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.dictionaries(st.sampled_from(["text", "id", "language", "other", "\udfff"]), VALUES, max_size=5) | VALUES


@given(rows=st.lists(ROWS, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_a_document_or_counted_as_broken(rows: list[Any]) -> None:
    def is_sound(row: Any) -> bool:
        if not isinstance(row, dict):
            return False
        text, language = row.get("text"), row.get("language")
        plain = all(isinstance(value, str) and value and "\ud800" not in value for value in (text, language))
        return plain and not str(text).isspace()

    with folder() as base:
        (base / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected = [row for row in rows if is_sound(row)]
        try:
            found = read_all(base / "a.jsonl")
        except CorpusError as error:
            assert not expected and "Set corpus.fields" in str(error)
            return
        assert [(row.text, row.language) for row in found] == [(row["text"], row["language"]) for row in expected]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tokenizer")
    tree = tiny_recipe(write_files(base / "corpus"))
    prepare(base / "run", parse_recipe(tree | {"executor": {"workers": 1}}), until="tokenizer")
    return base / "run" / "tokenizer"


def index_recipe(corpus: Path, tokenizer: Path, seed: int, deduplicate: str | None, **executor: int) -> Recipe:
    return parse_recipe(
        {
            "name": "t",
            "corpus": {"train": f"{corpus}/*.jsonl", "held_out": {"share": 0.2}, "deduplicate": deduplicate},
            "tokenizer": {"load": str(tokenizer)},
            "clusters": {"partitioner": "random", "k": 2, "seed": seed},
            "executor": {"workers": 1, **executor},
            "train": {"batch_sequences": 4},
        }
    )


DOCUMENTS = st.lists(st.tuples(st.sampled_from(LANGUAGES), st.integers(0, 60)), min_size=20, max_size=60)


@pytest.mark.slow
@given(files=st.lists(DOCUMENTS, min_size=1, max_size=3), draw=st.data())
@settings(
    max_examples=8,
    deadline=None,
    # an example takes half a second, so a failure is shown as it was found
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_the_index_holds_the_kept_documents_in_order_and_nothing_held_out(
    files: list[list[tuple[str, int]]], draw: st.DataObject, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deduplicate = draw.draw(st.sampled_from([None, "exact"]))
    executor = {"block_bytes": draw.draw(st.sampled_from([1000, 1700, 10**6])), "tasks": draw.draw(st.integers(1, 5))}
    # the report of the clusters is another test's
    monkeypatch.setattr("megaxelm.cluster.stage._diagnostics", lambda *_: {})
    monkeypatch.setattr("megaxelm.report.clusters.write_cluster_page", lambda *_: None)
    # every language has enough to divide between training, held-out text and clusters
    certain = [(code, 100 + i) for code in LANGUAGES for i in range(25)]
    with folder() as base:
        (base / "corpus").mkdir()
        rows = []
        for number, documents in enumerate([[*certain, *files[0]], *files[1:]]):
            mine = [{"language": code, "text": f"{code} {'wort ' * (i % 7)}{i} caf" + "\u00e9" * (1 + i % 3)} for code, i in documents]
            for row in mine[::2]:
                row["text"] = unicodedata.normalize("NFD", row["text"])
            rows += mine
            (base / "corpus" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
        recipe = index_recipe(base / "corpus", tokenizer, draw.draw(st.integers(0, 3)), deduplicate, **executor)
        prepare(base / "run", recipe)
        held_out = {
            text_key(json.loads(line)["text"])
            for path in (base / "run" / "corpus" / "valid").glob("*.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        }
        expected: dict[str, list[str]] = {code: [] for code in LANGUAGES}
        seen = set()
        for row in rows:
            key = text_key(row["text"])
            if key not in held_out and not (deduplicate and key in seen):
                expected[row["language"]].append(row["text"])
            seen.add(key)
        model = Tokenizer.load(tokenizer)
        for code in LANGUAGES:
            parts = []
            for path in (base / "run" / "index").glob(f"*/{code}.idx"):
                index = TokenIndex(path.with_suffix(""))
                parts.append([model.decode(index.document(i).tolist()) for i in range(index.num_documents)])
            assert held_out and merged(expected[code], parts)


def merged(whole: list[str], parts: list[list[str]]) -> bool:
    """Whether `whole` is divided into `parts`, equal texts in the same one, the order kept in each."""
    owners = {text: number for number, part in enumerate(parts) for text in part}
    return [[text for text in whole if owners.get(text) == number] for number in range(len(parts))] == parts and all(
        text in owners for text in whole
    )


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_shard_of_changed_bytes_opens_as_it_was_or_not_at_all(data: st.DataObject) -> None:
    languages = ["sw", "en", "sw", "ru"]
    tokens = [np.arange(1, 4 + i, dtype=np.int32) for i in range(4)]
    with folder() as base:
        write_shard(base, 400, languages, tokens, np.array([1, 2, 3, 1 << 63], np.uint64), np.array([3, 5, 7, 9], np.uint32))

        def content() -> list[Any]:
            shard = TokenShard(base)
            sections = [(item, shard.tokens(item).tolist(), shard.section(item.language) == item) for item in shard.sections]
            documents = [(document.language, document.key, document.tokens.tolist()) for document in shard.documents(1, 1)]
            return [sections, documents, shard.sizes.tolist(), shard.vocab_size]

        before = content()
        path = data.draw(st.sampled_from(sorted(base.iterdir())))
        whole = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            whole[place] ^= data.draw(st.integers(1, 255))
        else:
            del whole[place:]
        path.write_bytes(whole)
        try:
            assert content() == before
        except TokenIndexError as error:
            assert "--from tokens" in str(error)


@pytest.mark.parametrize("old, new", [('"sw"', '"sx"'), ('"vocab_size": 400', '"vocab_size": 300'), ('"num_bytes": 10', '"num_bytes": 11')])
def test_a_changed_account_of_a_shard_is_found(tmp_path: Path, old: str, new: str) -> None:
    keys, sizes = np.array([1, 2], np.uint64), np.array([3, 7], np.uint32)
    write_shard(tmp_path, 400, ["sw", "sw"], [np.arange(1, 4, dtype=np.int32)] * 2, keys, sizes)
    path = tmp_path / "shard.json"
    text = path.read_text(encoding="utf-8")
    assert old in text and TokenShard(tmp_path).num_documents == 2
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(TokenIndexError, match="shard.json has changed"):
        TokenShard(tmp_path)
