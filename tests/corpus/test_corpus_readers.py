"""Readers: every format, every kind of broken document, and errors that say what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from reading import Report, read_source

from megaxelm.corpus.document import Document, text_key
from megaxelm.corpus.inputs import list_inputs, source_fingerprint
from megaxelm.corpus.readers import Mark, Tally, read_rows
from megaxelm.errors import CorpusError
from megaxelm.recipe import CorpusConfig, FieldNames, FileSource, HuggingFaceSource

ROWS = [{"id": f"d{i}", "language": "sw", "text": f"habari ya {i}\nleo", "source": "x"} for i in range(5)]


def read(path: Path | str | list[str], share: float = 0.01, **kwargs: Any) -> tuple[list[Document], Report]:
    fields = kwargs.pop("fields", FieldNames())
    files = path if isinstance(path, list) else [str(path)]
    return read_source(FileSource(files=files, **kwargs), fields, share)


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def packed(data: bytes, ending: str) -> bytes:
    return {"": data, ".gz": gzip.compress(data), ".zst": zstandard.ZstdCompressor().compress(data)}[ending]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed(jsonl(ROWS), ending))
    documents, report = read(path)
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert documents[1] == Document("habari ya 1\nleo", "d1", "sw", {"source": "x"})
    assert (report.documents, report.broken) == (5, 0)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_several_compressed_members_are_one_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(packed(jsonl([row]), ending) for row in ROWS))
    assert len(read(path)[0]) == 5


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_is_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    data = packed(jsonl(ROWS * 50), ending)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CorpusError, match="a.jsonl"):
            read(path, share=1)


def test_a_last_line_without_newline_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS).rstrip(b"\n").replace(b"\n", b"\r\n"))
    assert len(read(tmp_path / "a.jsonl")[0]) == 5


BROKEN = {
    "not JSON": b'{"text": \n',
    "a JSON list": b'["sw", "habari"]\n',
    "a JSON str": b'"habari"\n',
    "no field `text`": b'{"language": "sw"}\n',
    "`text` is None, not text": b'{"language": "sw", "text": null}\n',
    "`text` is 5, not text": b'{"language": "sw", "text": 5}\n',
    "`text` is empty": b'{"language": "sw", "text": " \\n\\t "}\n',
    "surrogate pair": b'{"language": "sw", "text": "x \\ud83d y"}\n',
    "not UTF-8": b'{"language": "sw", "text": "caf\xe9"}\n',
    "`language` is None": b'{"language": null, "text": "habari"}\n',
    "no field `language`": b'{"text": "habari"}\n',
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_document_is_counted_with_its_line(tmp_path: Path, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([*ROWS[:2], BROKEN[reason], *ROWS[2:]]))
    documents, report = read(tmp_path / "a.jsonl", share=0.5)
    assert len(documents) == 5
    assert report.broken == 1
    assert report.examples[0].startswith("a.jsonl, line 3: ")
    assert reason in report.examples[0]


def test_too_many_broken_documents_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([*ROWS, b"{\n"]))
    assert len(read(tmp_path / "a.jsonl", share=0.17)[0]) == 5
    with pytest.raises(CorpusError, match=r"a\.jsonl: 1 of 6 documents are broken, more than corpus.max_bad_share = 0\.16") as error:
        read(tmp_path / "a.jsonl", share=0.16)
    assert "a.jsonl, line 6: not JSON" in str(error.value)


def test_a_file_that_is_wrong_all_through_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no json\n" * 100_000)
    source = FileSource(files=[str(tmp_path / "a.jsonl")])
    tally = Tally("a.jsonl", CorpusConfig(train=[source]))
    with pytest.raises(CorpusError, match="100 of 100"):
        list(read_rows(list_inputs([source])[0], source, tally))
    assert len(tally.examples) == 20


@pytest.mark.parametrize(
    ("fields", "way_out"), [(FieldNames(text="body"), "corpus.fields.text"), (FieldNames(language="lang"), "corpus.fields.language")]
)
def test_a_field_that_no_document_has_is_named_with_those_there_are(tmp_path: Path, fields: FieldNames, way_out: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(CorpusError, match=f"the fields are: id, language, text, source. Set {way_out}"):
        read(tmp_path / "a.jsonl", share=1, fields=fields)


def test_numbers_that_orjson_refuses_do_not_cost_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "habari", "language": "sw", "score": NaN}\n')
    assert len(read(tmp_path / "a.jsonl")[0]) == 1


def test_ids_are_stable_and_never_a_path(tmp_path: Path) -> None:
    rows = [{"text": "habari", "language": "sw"}, {"text": "habari", "language": "en"}, {"text": "x", "language": "sw", "id": 7}]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(jsonl(rows))
    first, second = (read(tmp_path / name / "x.jsonl")[0] for name in ("a", "b"))
    assert [document.id for document in first] == [document.id for document in second]
    assert len(first[0].id) == 16 and first[0].id != first[1].id
    assert first[2].id == "7"


def test_text_files_take_their_language_from_the_folder(tmp_path: Path) -> None:
    for language in ("sw", "zh"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "one.txt").write_text("mstari\n\nwa pili\n", encoding="utf-8")
    documents, _ = read(f"{tmp_path}/**/*.txt")
    assert [(document.language, document.text) for document in documents] == [("sw", "mstari\n\nwa pili\n"), ("zh", "mstari\n\nwa pili\n")]
    assert {document.language for document in read(f"{tmp_path}/*/*.txt", language="en")[0]} == {"en"}


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [*ROWS, {"id": "e", "language": "sw", "text": None, "source": "x"}]
    pq.write_table(pa.Table.from_pylist([{**row, "parts": [1, 2]} for row in rows]), tmp_path / "a.parquet", row_group_size=2)
    documents, report = read(tmp_path / "a.parquet", share=0.5)
    assert documents == read_jsonl(tmp_path)
    assert report.examples == ["a.parquet, row 6: `text` is None, not text"]


def read_jsonl(folder: Path) -> list[Document]:
    (folder / "same.jsonl").write_bytes(jsonl(ROWS))
    return read(folder / "same.jsonl")[0]


def test_parquet_that_is_cut_or_something_else_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"hello", data[:100] + b"\0" * 200 + data[300:]):
        (tmp_path / "a.parquet").write_bytes(broken)
        with pytest.raises(CorpusError, match="a.parquet"):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("no.jsonl", "does not exist"), ("*.nothing", "matches no file"), ("", "is a folder")],
)
def test_a_source_that_is_not_there_is_an_error(tmp_path: Path, pattern: str, reason: str) -> None:
    with pytest.raises(CorpusError, match=reason):
        read(tmp_path / pattern if pattern else tmp_path)


def test_an_unknown_ending_is_an_error_under_auto_alone(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(jsonl(ROWS))
    with pytest.raises(CorpusError, match="unknown ending"):
        read(tmp_path / "a.data")
    assert len(read(tmp_path / "a.data", format="jsonl")[0]) == 5


def test_a_local_hugging_face_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "swahili"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(ROWS))
    source = HuggingFaceSource(huggingface=str(folder))
    documents, _ = read_source(source)
    assert [document.id for document in documents] == [row["id"] for row in ROWS]
    with pytest.raises(CorpusError, match="the fields are: id, language, text, source"):
        read_source(source, FieldNames(text="body"))
    with pytest.raises(CorpusError, match="check `huggingface:`"):
        read_source(HuggingFaceSource(huggingface=str(folder), split="nothing"))
    name = "swahili:default:train"
    before = source_fingerprint([source])
    assert list(before) == [name]
    (folder / "train.jsonl").write_bytes(jsonl(ROWS[:4]))
    assert source_fingerprint([source])[name] != before[name]


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        for language in ("en", "sw"):
            (tmp_path / place / language).mkdir(parents=True)
            (tmp_path / place / language / "a.jsonl").write_bytes(jsonl(ROWS))
    here, there = (FileSource(files=[f"{tmp_path}/{place}/**/*.jsonl"]) for place in ("here", "there"))
    assert source_fingerprint([here]) == source_fingerprint([there])
    assert list(source_fingerprint([here])) == ["en/a.jsonl", "sw/a.jsonl"]
    changed = tmp_path / "there" / "sw" / "a.jsonl"
    changed.write_bytes(changed.read_bytes().replace(b"habari ya 4", b"habari ya 9"))
    assert source_fingerprint([here])["sw/a.jsonl"] != source_fingerprint([there])["sw/a.jsonl"]


def test_the_text_key_does_not_see_the_normal_form() -> None:
    assert text_key("caf\u00e9") == text_key("cafe\u0301")
    assert text_key("cafe") != text_key("caf\u00e9")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "huggingface"])
def test_reading_goes_on_from_any_mark(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"id": f"d{i}", "language": "sw", "text": f"habari \u00e9\u6f22 {i}\n" * (i % 3 + 1)} for i in range(23)]
    folder = tmp_path / "sw"
    folder.mkdir()
    source: FileSource | HuggingFaceSource = FileSource(files=[f"{folder}/*.{kind}"])
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=5)
    elif kind == "txt":
        for i, row in enumerate(rows):
            (folder / f"{i:02}.txt").write_text(row["text"], encoding="utf-8")
    elif kind == "huggingface":
        (folder / "train.jsonl").write_bytes(jsonl(rows))
        source = HuggingFaceSource(huggingface=str(folder))
    else:
        (folder / f"a.{kind}").write_bytes(packed(jsonl([*rows[:7], b"{broken\n", b"\n", *rows[7:]]), kind.removeprefix("jsonl")))
    corpus = CorpusConfig(train=[source], max_bad_share=0.5)
    (item,) = list_inputs([source])
    whole = list(read_rows(item, source, Tally("a", corpus)))
    assert [row.text for row in whole] == [row["text"] for row in rows]
    for number in (0, 1, 4, 5, 6, 7, 12, 22):
        assert list(read_rows(item, source, Tally("a", corpus), whole[number].mark)) == whole[number:]
    assert whole[0].mark == Mark(0, 0)


def test_a_file_behind_fsspec_is_read_like_a_local_one(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name, data in (("x/b.jsonl.zst", packed(jsonl(ROWS[3:]), ".zst")), ("x/a.jsonl", jsonl(ROWS[:3]))):
        with store.open(f"memory://bucket/{name}", "wb") as file:
            file.write(data)
    try:
        documents, _ = read("memory://bucket/x/*.jsonl*")
        assert [document.id for document in documents] == [row["id"] for row in ROWS]
        before = source_fingerprint([FileSource(files=["memory://bucket/x/*"])])
        assert list(before) == ["memory:///bucket/x/a.jsonl", "memory:///bucket/x/b.jsonl.zst"]
        with pytest.raises(CorpusError, match="matches no file; check the address"):
            read("memory://bucket/y/*.jsonl")
        with pytest.raises(CorpusError, match="cannot be reached"):
            read("nostore://bucket/x")
    finally:
        store.rm("/bucket", recursive=True)


def test_names_and_languages_that_are_no_unicode_are_told_in_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS) + b'{"\\ud800": 1}\n{"text": "x", "language": "\\ud800"}\n')
    documents, report = read(path, share=0.5)
    assert len(documents) == 5 and report.broken == 2
    assert all(example.encode("utf-8") and "ud800" in example for example in report.examples)


def test_parquet_columns_that_python_cannot_hold_do_no_harm(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "text": pa.array([f"habari {i}" for i in range(3)]),
        "language": pa.array(["sw"] * 3).dictionary_encode(),
        "when": pa.array([2**50] * 3, pa.timestamp("s")),
        "fine": pa.array([1, 2, 3], pa.timestamp("ns")),
        "nested": pa.array([{"text": [1]}] * 3),
        "likes": pa.array([1, None, 3]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    documents, report = read(tmp_path / "a.parquet")
    assert [(d.text, d.language, d.meta) for d in documents] == [
        ("habari 0", "sw", {"likes": 1}), ("habari 1", "sw", {}), ("habari 2", "sw", {"likes": 3}),
    ]  # fmt: skip
    assert report.broken == 0
