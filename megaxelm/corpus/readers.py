"""Rows of an input, streaming, from its front or from a mark in it, and what is a document among them.

A broken document never passes in silence: it is counted in a `Tally` with file and line, and when more than `corpus.max_bad_share` of an
input is broken the reading stops. Blank lines of JSON lines files are no documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from megaxelm.corpus.catalogs import BrokenCatalog, catalog_sources, read_catalogs
from megaxelm.corpus.inputs import (
    DATASET_ADVICE,
    AnySource,
    Input,
    chunks,
    dataset_name,
    folder_name,
    lines,
    open_bytes,
    open_dataset,
    reason,
    short_names,
)
from megaxelm.errors import CorpusError
from megaxelm.recipe import CatalogSource, CorpusConfig, FileSource, HuggingFaceSource

MAX_EXAMPLES = 20
_EARLY_ROWS = 100
_EARLY_BAD = 10
_LANGUAGE_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class Mark(NamedTuple):
    """A place in an input: where to read on."""

    rows: int = 0
    """Rows (lines, files, documents of catalogs) before it."""
    offset: int = 0
    """Bytes before it, decompressed; for JSON lines."""


class Row(NamedTuple):
    """A sound document as it stands in the input. `language` is empty where it is to be detected."""

    mark: Mark
    place: str
    text: str
    id: str | None
    language: str
    meta: dict[str, Any]


@dataclass
class Tally:
    """What a reading of one input met. `examples`: the first broken documents."""

    name: str
    corpus: CorpusConfig
    total: int = 0
    broken: int = 0
    examples: list[str] = field(default_factory=list)
    judged: bool = True
    """Whether the share of broken ones is looked at here. Not for a group of text files, whose share is that of the whole source."""
    _lacking: int = 0
    _lacking_field: str = ""
    _lacking_row: str = ""

    def sound(self) -> None:
        """Count a sound document."""
        self.total += 1

    def count_broken(self, place: str, why: str) -> None:
        """Count a broken document; `place` is a line, row or file, or empty."""
        self.total += 1
        self.broken += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{self.name}{', ' if place else ''}{place}: {why}")
        # an input that is wrong all through is not read to its end, but two broken lines among the first hundred prove nothing
        if self.total >= _EARLY_ROWS and self.broken >= _EARLY_BAD:
            self.judge()

    def lacks(self, place: str, name: str, kind: str, row: dict[str, Any]) -> None:
        """Count a document without the field `name`, which `corpus.fields.<kind>` asks for."""
        self._lacking += 1
        # names may hold half surrogates, which no file takes
        has = ", ".join(map(str, list(row)[:20])).encode("utf-8", "backslashreplace").decode("utf-8") or "none"
        if not self._lacking_field:
            self._lacking_field, self._lacking_row = kind, has
        self.count_broken(place, f"no field `{name}` (it has: {has})")

    def judge(self) -> None:
        """Raise CorpusError when too many documents are broken."""
        if self._lacking and self._lacking == self.total:
            kind = self._lacking_field
            also = ", or give the source a `language:`" if kind == "language" else ""
            raise CorpusError(
                f"{self.name}: no document has the field `{getattr(self.corpus.fields, kind)}`; the fields are: {self._lacking_row}. "
                f"Set corpus.fields.{kind} to the one that holds the {kind}{also}"
            )
        if self.judged:
            judge_share(self.name, self.total, self.broken, self.examples, self.corpus.max_bad_share)


def judge_share(name: str, total: int, broken: int, examples: list[str], max_bad_share: float) -> None:
    """Raise CorpusError when more than `max_bad_share` of `total` documents are broken."""
    if broken > max_bad_share * total:
        shown = "".join(f"\n  {example}" for example in examples[:5])
        raise CorpusError(
            f"{name}: {broken} of {total} documents are broken, more than corpus.max_bad_share = {max_bad_share:g} allows. "
            f"Mend the file, or raise corpus.max_bad_share to leave them out. The first:{shown}"
        )


def read_rows(item: Input, source: AnySource, tally: Tally, start: Mark = Mark()) -> Iterator[Row]:  # noqa: B008 - a constant
    """Sound documents of an input from `start` on, in a stable order. The input is judged when it has been read to its end.

    Raises:
        CorpusError: what cannot be read or was cut, a field that no document has, or too many broken documents.
    """
    tally.judged = item.kind != "text"
    if isinstance(source, HuggingFaceSource):
        found = _dataset_rows(item, source, start)
    elif isinstance(source, CatalogSource):
        found = _catalog_rows(source, tally, start)
    elif item.kind == "text":
        found = _text_rows(item, source, tally, start)
    else:
        found = (_json_rows if item.kind == "jsonl" else _parquet_rows)(item.files[0], tally, start)
    for mark, place, row in found:
        language = row[tally.corpus.fields.language] if isinstance(source, CatalogSource) else source.language
        document = _row(mark, place, row, tally, language)
        if document is not None:
            yield document
    tally.judge()


def describe_source(source: AnySource, inputs: list[Input]) -> list[dict[str, Any]]:
    """Names and licences of a source, for the manifest; `inputs` are its own."""
    if isinstance(source, HuggingFaceSource):
        return [{"kind": "huggingface", "name": dataset_name(source), "config": source.config, "split": source.split}]
    if isinstance(source, CatalogSource):
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
    return [{"kind": "files", "files": [item.name for item in inputs]}]


def check_language(code: str, where: str) -> None:
    """Raise CorpusError unless the code can name a file on every system."""
    if not _LANGUAGE_CODE.fullmatch(code):
        raise CorpusError(
            f"{where}: language {_shown(code)} cannot be a code: letters, digits, - and _ only, 32 at most, because it "
            "names files. Check corpus.fields.language"
        )


def _row(mark: Mark, place: str, row: dict[str, Any], tally: Tally, language: str | None) -> Row | None:
    """The document of a row, or None if it is broken."""
    fields = tally.corpus.fields
    if language is None:
        if tally.corpus.language == "detect":
            language = ""
        elif fields.language not in row:
            tally.lacks(place, fields.language, "language", row)
            return None
        else:
            language = row[fields.language]
            if not isinstance(language, str) or not language or not _is_unicode(language):
                tally.count_broken(place, f"`{fields.language}` is {_shown(language)}, not a language code")
                return None
    if fields.text not in row:
        tally.lacks(place, fields.text, "text", row)
        return None
    text = row[fields.text]
    if not isinstance(text, str):
        tally.count_broken(place, f"`{fields.text}` is {_shown(text)}, not text")
        return None
    if not text or text.isspace():
        tally.count_broken(place, f"`{fields.text}` is empty")
        return None
    if not _is_unicode(text):
        tally.count_broken(place, f"`{fields.text}` holds half of a surrogate pair, so it is not Unicode text")
        return None
    tally.sound()
    identifier = row.get(fields.id)
    known = isinstance(identifier, str) and identifier and _is_unicode(identifier)
    if not known and not (isinstance(identifier, int) and not isinstance(identifier, bool)):
        identifier = None
    meta = {
        key: value
        for key, value in row.items()
        if key not in (fields.text, fields.id, fields.language) and isinstance(value, str | int | float | bool)
    }
    return Row(mark, place, text, None if identifier is None else str(identifier), language, meta)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_Found = Iterator[tuple[Mark, str, dict[str, Any]]]


def _text_rows(item: Input, source: FileSource, tally: Tally, start: Mark) -> _Found:
    fields = tally.corpus.fields
    names = short_names(item.files)
    for number in range(start.rows, len(item.files)):
        address = item.files[number]
        place = names[number] if len(names) > 1 else ""
        data = b"".join(chunks(address))
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            tally.count_broken(place, f"not UTF-8 ({error.reason} at byte {error.start})")
            continue
        yield Mark(number), place, {fields.text: text, fields.language: folder_name(address)}


def _json_rows(address: str, tally: Tally, start: Mark) -> _Found:
    for number, (offset, line) in enumerate(lines(address, start.offset), start=start.rows):
        if not number:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        place = f"line {number + 1}"
        try:
            row = _parse(line)
        except UnicodeDecodeError as error:
            tally.count_broken(place, f"not UTF-8 ({error.reason} at byte {error.start})")
            continue
        except (ValueError, RecursionError) as error:
            tally.count_broken(place, f"not JSON ({error})")
            continue
        if not isinstance(row, dict):
            tally.count_broken(place, f"a JSON {type(row).__name__}, not an object; one object a line is expected")
            continue
        yield Mark(number, offset), place, row


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # the standard library also takes NaN and half surrogates, which are common in the wild: those are judged by field
        return json.loads(line.decode("utf-8"))


def _parquet_rows(address: str, tally: Tally, start: Mark) -> _Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_bytes(address) as file, pq.ParquetFile(file) as table:
            asked = {getattr(tally.corpus.fields, name) for name in type(tally.corpus.fields).model_fields}
            columns = [column.name for column in table.schema_arrow if column.name in asked or _is_meta(column.type)]
            groups = list(range(table.metadata.num_row_groups))
            while groups and number + table.metadata.row_group(groups[0]).num_rows <= start.rows:
                number += table.metadata.row_group(groups.pop(0)).num_rows
            for batch in table.iter_batches(batch_size=1024, columns=columns, row_groups=groups) if groups else ():
                for i in range(batch.num_rows):
                    number += 1
                    if number <= start.rows:
                        continue
                    try:
                        row = {name: batch.column(j)[i].as_py() for j, name in enumerate(batch.schema.names)}
                    except UnicodeDecodeError as error:
                        tally.count_broken(f"row {number}", f"not UTF-8 ({error.reason} at byte {error.start})")
                        continue
                    yield Mark(number - 1), f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{address}: cannot be read as Parquet after row {number} ({error}); write it again or leave it out of corpus.train"
        ) from None


def _is_meta(kind: Any) -> bool:
    """Whether a Parquet column can be kept as a document's `meta`. Others are not read: not every date is one to Python."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating)) or (
        pa.types.is_boolean(kind)
    )


def _dataset_rows(item: Input, source: HuggingFaceSource, start: Mark) -> _Found:
    rows = open_dataset(source)
    if rows.num_shards > 1:
        rows = rows.shard(num_shards=rows.num_shards, index=item.part)
    number = start.rows
    try:
        iterator = iter(rows.skip(number) if number else rows)
    except Exception as error:
        raise CorpusError(f"Hugging Face dataset {source.huggingface}: {reason(error)}; {DATASET_ADVICE}") from error
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise CorpusError(
                f"Hugging Face dataset {source.huggingface}: stopped after row {number}: {reason(error)}; {DATASET_ADVICE}"
            ) from error
        number += 1
        yield Mark(number - 1), f"row {number}", row


def _catalog_rows(source: CatalogSource, tally: Tally, start: Mark) -> _Found:
    fields = tally.corpus.fields
    for number, item in enumerate(read_catalogs(source)):
        if number < start.rows:
            continue
        if isinstance(item, BrokenCatalog):
            tally.count_broken(item.name, item.reason)
            continue
        yield Mark(number), item.id, {fields.text: item.text, fields.id: item.id, fields.language: item.language}
