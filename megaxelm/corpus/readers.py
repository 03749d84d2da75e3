"""Documents from files, Hugging Face datasets and message catalogs, streaming.

A broken document never passes in silence: it is counted in a `ReadReport` with file and line, and when more than
`corpus.max_bad_share` of a file is broken the reading stops. Blank lines of JSON lines files are no documents.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megaxelm.corpus.catalogs import BrokenCatalog, catalog_fingerprint, catalog_sources, read_catalogs
from megaxelm.corpus.document import Document
from megaxelm.corpus.input_files import chunks, expand_files, file_value, lines, short_names
from megaxelm.errors import CorpusError
from megaxelm.recipe import CatalogSource, FieldNames, FileSource, HuggingFaceSource

AnySource = FileSource | HuggingFaceSource | CatalogSource
_MAX_EXAMPLES = 20
_EARLY_LINES = 100
_EARLY_BAD = 10
_LANGUAGE_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass
class ReadReport:
    """What a reading met. `examples`: the first 20 broken documents; `skipped`: documents by language that was not asked for."""

    documents: int = 0
    broken: int = 0
    examples: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read_source(
    source: AnySource,
    fields: FieldNames,
    max_bad_share: float,
    report: ReadReport,
    languages: Collection[str] | None = None,
) -> Iterator[Document]:
    """Documents of one source in a stable order; those in a language outside of `languages` (null: all) are skipped and counted.

    Raises:
        CorpusError: nothing to read, a file that cannot be read or was cut, a missing field, or too many broken documents.
    """
    context = _Context(fields, max_bad_share, report, None if languages is None else frozenset(languages), source)
    if isinstance(source, FileSource):
        yield from _read_files(source, context)
    elif isinstance(source, HuggingFaceSource):
        yield from _read_huggingface(source, context)
    else:
        yield from _read_catalogs(source, context)


def source_fingerprint(sources: Sequence[AnySource]) -> dict[str, str]:
    """A cheap value for each input, to find out whether a run is stale: {name: "size:hash"}.

    The hash covers size, first and last 64 kB. Names are relative to the common folder of all files: a moved corpus stays the same.

    Raises:
        CorpusError: as `read_source`, for what is not there.
    """
    paths = [path for source in sources if isinstance(source, FileSource) for path in expand_files(source)]
    fingerprint = dict(zip(short_names(paths), map(file_value, paths), strict=True))
    for source in sources:
        if isinstance(source, HuggingFaceSource):
            fingerprint.update(_huggingface_fingerprint(source))
        elif isinstance(source, CatalogSource):
            fingerprint.update(catalog_fingerprint(source))
    return fingerprint


def describe_source(source: AnySource) -> list[dict[str, Any]]:
    """Names and licences of a source, for the manifest."""
    if isinstance(source, FileSource):
        return [{"kind": "files", "files": short_names(expand_files(source))}]
    if isinstance(source, HuggingFaceSource):
        return [{"kind": "huggingface", "name": _dataset_name(source), "config": source.config, "split": source.split}]
    return [
        {
            "kind": "catalogs",
            "package": item.package,
            "distribution": item.distribution,
            "version": item.version,
            "licence": item.licence,
            "url": item.url,
        }
        for item in catalog_sources(source)
    ]


@dataclass(frozen=True)
class _Context:
    fields: FieldNames
    max_bad_share: float
    report: ReadReport
    languages: frozenset[str] | None
    source: AnySource


class _Tally:
    """Counts the documents of one file and stops the reading when too many are broken."""

    def __init__(self, name: str, path: str, context: _Context) -> None:
        self.name, self.path, self.context = name, path, context
        self.total = self.bad = self.lacking = 0
        self.examples: list[str] = []
        self.lacking_field, self.lacking_row = "", ""

    def broken(self, place: str, reason: str) -> None:
        """Count a broken document; `place` is a line or row, or empty."""
        report = self.context.report
        self.total += 1
        self.bad += 1
        report.broken += 1
        text = f"{self.name}{', ' if place else ''}{place}: {reason}"
        if len(report.examples) < _MAX_EXAMPLES:
            report.examples.append(text)
        if len(self.examples) < 5:
            self.examples.append(text)
        # a file that is wrong all through is not read to its end, but two broken lines among the first hundred prove nothing
        if self.total >= _EARLY_LINES and self.bad >= _EARLY_BAD:
            self._judge()

    def lacks(self, place: str, name: str, kind: str, row: dict[str, Any]) -> None:
        """Count a document without the field `name`, which `corpus.fields.<kind>` asks for."""
        self.lacking += 1
        if not self.lacking_field:
            self.lacking_field, self.lacking_row = kind, ", ".join(map(str, list(row)[:20])) or "none"
        self.broken(place, f"no field `{name}` (it has: {', '.join(map(str, list(row)[:20])) or 'none'})")

    def finish(self) -> None:
        """The file has been read to its end."""
        self._judge()

    def _judge(self) -> None:
        context = self.context
        if self.lacking and self.lacking == self.total:
            kind = self.lacking_field
            also = ", or give the source a `language:`" if kind == "language" else ""
            raise CorpusError(
                f"{self.path}: no document has the field `{getattr(context.fields, kind)}`; the fields are: {self.lacking_row}. "
                f"Set corpus.fields.{kind} to the one that holds the {kind}{also}"
            )
        if self.bad > context.max_bad_share * self.total:
            examples = "".join(f"\n  {example}" for example in self.examples)
            raise CorpusError(
                f"{self.path}: {self.bad} of {self.total} documents are broken, more than corpus.max_bad_share = {context.max_bad_share:g} "
                f"allows. Mend the file, or raise corpus.max_bad_share to leave them out. The first:{examples}"
            )


def _document(row: dict[str, Any], place: str, tally: _Tally, language: str | None) -> Document | None:
    """The document of a row, or None if it is broken or in a language not asked for."""
    context = tally.context
    fields = context.fields
    if language is None:
        if fields.language not in row:
            tally.lacks(place, fields.language, "language", row)
            return None
        language = row[fields.language]
        if not isinstance(language, str) or not language:
            tally.broken(place, f"`{fields.language}` is {_shown(language)}, not a language code")
            return None
    if fields.text not in row:
        tally.lacks(place, fields.text, "text", row)
        return None
    text = row[fields.text]
    if not isinstance(text, str):
        tally.broken(place, f"`{fields.text}` is {_shown(text)}, not text")
        return None
    if not text or text.isspace():
        tally.broken(place, f"`{fields.text}` is empty")
        return None
    if not _is_unicode(text):
        tally.broken(place, f"`{fields.text}` holds half of a surrogate pair, so it is not Unicode text")
        return None
    tally.total += 1
    if context.languages is not None and language not in context.languages:
        context.report.skipped[language] += 1
        return None
    check_language(language, f"{tally.path}{', ' if place else ''}{place}")
    context.report.documents += 1
    identifier = row.get(fields.id)
    known = isinstance(identifier, str) and identifier and _is_unicode(identifier)
    if not known and not (isinstance(identifier, int) and not isinstance(identifier, bool)):
        identifier = hash_id(text, language)
    meta = {
        key: value
        for key, value in row.items()
        if key not in (fields.text, fields.id, fields.language) and isinstance(value, str | int | float | bool)
    }
    return Document(text, str(identifier), language, meta)


def check_language(code: str, where: str) -> None:
    """Raise CorpusError unless the code can name a file on every system."""
    if not _LANGUAGE_CODE.fullmatch(code):
        raise CorpusError(
            f"{where}: language {_shown(code)} cannot be a code: letters, digits, - and _ only, 32 at most, because it "
            "names files. Check corpus.fields.language"
        )


def hash_id(text: str, language: str) -> str:
    """The id of a document that came without one: hex of xxh3_64 over language and text."""
    return xxhash.xxh3_64_hexdigest(f"{language}\0{text}".encode())


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_files(source: FileSource, context: _Context) -> Iterator[Document]:
    paths = expand_files(source)
    names = short_names(paths)
    formats = [_format_of(path, source) for path in paths]
    # a text file is one document, so the share of broken ones is that of the whole source
    text_tally = _Tally(f"{len(paths)} text files", ", ".join(source.files), context)
    for path, name, kind in zip(paths, names, formats, strict=True):
        if kind == "text":
            yield from _read_text(path, name, source, text_tally)
            continue
        tally = _Tally(name, str(path), context)
        reader = _jsonl_rows if kind == "jsonl" else _parquet_rows
        for place, row in reader(path, tally):
            document = _document(row, place, tally, source.language)
            if document is not None:
                yield document
        tally.finish()
    text_tally.finish()


def _format_of(path: Path, source: FileSource) -> str:
    if source.format != "auto":
        return source.format
    name = path.name.lower()
    bare = name.removesuffix(".gz").removesuffix(".zst")
    kind = next((kind for ending, kind in _FORMATS.items() if bare.endswith(ending)), None)
    if kind is None or (kind == "parquet" and bare != name):
        raise CorpusError(
            f"{path}: unknown ending; corpus source format `auto` knows .jsonl and .json (also .gz, .zst), .parquet and .txt. "
            "Set `format:` of this source to jsonl, parquet or text, or narrow the glob"
        )
    return kind


def _read_text(path: Path, name: str, source: FileSource, tally: _Tally) -> Iterator[Document]:
    language = source.language or path.resolve().parent.name
    data = b"".join(chunks(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        tally.broken("", f"{name} is not UTF-8 ({error.reason} at byte {error.start})")
        return
    if not text or text.isspace():
        tally.broken("", f"{name} is empty")
        return
    document = _document({tally.context.fields.text: text}, name, tally, language)
    if document is not None:
        yield document


def _jsonl_rows(path: Path, tally: _Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines(path), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        place = f"line {number}"
        try:
            row = _parse(line)
        except UnicodeDecodeError as error:
            tally.broken(place, f"not UTF-8 ({error.reason} at byte {error.start})")
            continue
        except (ValueError, RecursionError) as error:
            tally.broken(place, f"not JSON ({error})")
            continue
        if not isinstance(row, dict):
            tally.broken(place, f"a JSON {type(row).__name__}, not an object; one object a line is expected")
            continue
        yield place, row


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # the standard library also takes NaN and half surrogates, which are common in the wild: those are judged by field
        return json.loads(line.decode("utf-8"))


def _parquet_rows(path: Path, tally: _Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            columns = [column.name for column in table.schema_arrow if not pa.types.is_nested(column.type)]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        row = {name: batch.column(j)[i].as_py() for j, name in enumerate(batch.schema.names)}
                    except UnicodeDecodeError as error:
                        tally.broken(f"row {number}", f"not UTF-8 ({error.reason} at byte {error.start})")
                        continue
                    yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path}: cannot be read as Parquet after row {number} ({error}); write it again or leave it out of corpus.train"
        ) from None


def _read_huggingface(source: HuggingFaceSource, context: _Context) -> Iterator[Document]:
    import datasets

    name = _dataset_name(source)
    tally = _Tally(name, f"Hugging Face dataset {source.huggingface}", context)
    advice = "check `huggingface:`, `config:`, `split:` and `data_files:` of this corpus source, and the network"
    try:
        rows = datasets.load_dataset(source.huggingface, source.config, data_files=source.data_files, split=source.split, streaming=True)
        iterator = iter(rows)
    except Exception as error:
        raise CorpusError(f"Hugging Face dataset {source.huggingface}, split {source.split}: {_reason(error)}; {advice}") from error
    number = 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            raise CorpusError(
                f"Hugging Face dataset {source.huggingface}: stopped after row {number}: {_reason(error)}; {advice}"
            ) from error
        number += 1
        document = _document(row, f"row {number}", tally, source.language)
        if document is not None:
            yield document
    tally.finish()


def _read_catalogs(source: CatalogSource, context: _Context) -> Iterator[Document]:
    tally = _Tally("catalogs", "message catalogs of " + ", ".join(source.catalogs), context)
    for item in read_catalogs(source):
        if isinstance(item, BrokenCatalog):
            tally.broken(item.name, item.reason)
            continue
        document = _document({context.fields.text: item.text, context.fields.id: item.id}, item.id, tally, item.language)
        if document is not None:
            yield document
    tally.finish()


def _dataset_name(source: HuggingFaceSource) -> str:
    return Path(source.huggingface).resolve().name if os.path.isdir(source.huggingface) else source.huggingface


def _huggingface_fingerprint(source: HuggingFaceSource) -> dict[str, str]:
    name = f"huggingface:{_dataset_name(source)}:{source.config or 'default'}:{source.split}"
    if not os.path.isdir(source.huggingface):
        return {name: "hub"}
    folder = Path(source.huggingface)
    digest, size = xxhash.xxh3_64(), 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}={file_value(path)}".encode())
        size += path.stat().st_size
    return {name: f"{size}:{digest.hexdigest()}"}


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
