"""Stage `corpus`: one streaming pass that validates, counts, keeps the held-out documents and a bounded sample of every language.

The training text is not copied: `training_documents` reads the sources a second time and leaves out what is held out. Sample and held-out
documents are those with the smallest text keys, which is a random choice over the whole source that does not depend on its order.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megaxelm.corpus.document import Document, text_key
from megaxelm.corpus.readers import AnySource, ReadReport, check_language, describe_source, read_source
from megaxelm.errors import CorpusError, StageError
from megaxelm.files import read_json
from megaxelm.recipe import Recipe


class SmallestKeys:
    """Keeps the documents with the smallest keys, `max_bytes` of UTF-8 text in all, each text once, whatever order they come in.

    A document of more than half of `max_bytes` would push out all others: it is kept only if there is no smaller one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._heap: list[tuple[int, str, Document]] = []
        self._keys: set[int] = set()
        self._refused_from: int | None = None
        self._large: tuple[int, Document] | None = None

    def add(self, key: int, document: Document) -> None:
        """Offer a document."""
        if key in self._keys or (self._refused_from is not None and key >= self._refused_from):
            return
        size = document.num_bytes
        if size > self.max_bytes // 2:
            if self._large is None or key < self._large[0]:
                self._large = key, document
            return
        heapq.heappush(self._heap, (-key, document.id, document))
        self._keys.add(key)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            largest, _, dropped = heapq.heappop(self._heap)
            self._keys.remove(-largest)
            self.num_bytes -= dropped.num_bytes
            # without this bound a later small document could take a place that an earlier one was refused
            self._refused_from = -largest

    def discard(self, key: int) -> None:
        """Take one document out."""
        for i, (negative, _, document) in enumerate(self._heap):
            if -negative == key:
                self._heap.pop(i)
                heapq.heapify(self._heap)
                self._keys.remove(key)
                self.num_bytes -= document.num_bytes
                return
        if self._large is not None and self._large[0] == key:
            self._large = None

    def documents(self) -> list[tuple[int, Document]]:
        """(key, document) in order of key."""
        if not self._heap and self._large is not None:
            return [self._large]
        return sorted(((-negative, document) for negative, _, document in self._heap), key=lambda pair: pair[0])


@dataclass
class _Language:
    sample: SmallestKeys
    valid: SmallestKeys
    train_documents: int = 0
    train_bytes: int = 0
    held_out_documents: int = 0
    smallest: tuple[int, Document] | None = None
    smallest_count: int = 0
    smallest_bytes: int = 0
    smallest_key_rule: bool = False
    other_keys: bool = field(default=False)


def prepare_corpus(recipe: Recipe, out: Path) -> None:
    """Read all sources once and write `manifest.json`, `valid/<language>.jsonl`, `valid/keys.npy` and `sample/<language>.jsonl` into `out`.

    Raises:
        CorpusError: what `read_source` raises; no documents; a language without training or without held-out text.
    """
    corpus = recipe.corpus
    for code in corpus.languages or []:
        check_language(code, "corpus.languages")
    found: dict[str, _Language] = defaultdict(lambda: _Language(SmallestKeys(corpus.sample_bytes), SmallestKeys(corpus.valid_bytes)))
    keys: set[int] = set()
    report, valid_report = ReadReport(), ReadReport()
    duplicates = 0
    for document in _read(corpus.valid, recipe, valid_report, "corpus: held-out text"):
        key = text_key(document.text)
        keys.add(key)
        _hold_out(found[document.language], key, document)
    threshold = 0 if corpus.valid else _threshold(corpus.held_out.share)
    for document in _read(corpus.train, recipe, report, "corpus: training text"):
        key = text_key(document.text)
        language = found[document.language]
        if key < threshold:
            keys.add(key)
            _hold_out(language, key, document)
        elif key in keys:
            duplicates += 1
        else:
            _train_on(language, key, document)
    if not corpus.valid:
        for language in found.values():
            if not language.held_out_documents and language.other_keys and language.smallest is not None:
                keys.add(_hold_out_smallest(language))
    _check(recipe, found, report)
    used = {code: language for code, language in sorted(found.items()) if language.train_documents}
    _write(out, used, keys)
    unused = {code: language.held_out_documents for code, language in sorted(found.items()) if code not in used}
    manifest = {
        "languages": {code: _counts(language) for code, language in used.items()},
        "held_out": "given" if corpus.valid else "hash",
        "held_out_share": None if corpus.valid else corpus.held_out.share,
        "held_out_by_smallest_key": [code for code, language in used.items() if language.smallest_key_rule],
        "duplicates_of_valid": duplicates,
        "skipped_languages": dict(sorted((report.skipped + valid_report.skipped).items())),
        "valid_without_training": unused,
        "broken": {"count": report.broken + valid_report.broken, "examples": (report.examples + valid_report.examples)[:20]},
        "sources": {
            "train": [item for source in corpus.train for item in describe_source(source)],
            "valid": [item for source in corpus.valid for item in describe_source(source)],
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def training_documents(recipe: Recipe, corpus_folder: Path) -> Iterator[Document]:
    """The second pass: every document of `corpus.train` whose text is not held out, in the order of the sources.

    Raises:
        CorpusError: as in the first pass.
    """
    manifest = load_manifest(corpus_folder)
    keys_file = corpus_folder / "valid" / "keys.npy"
    try:
        keys = set(np.load(keys_file).tolist())
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"{keys_file}: missing or damaged ({error}); make the corpus stage again (--from corpus)") from None
    threshold = 0 if manifest["held_out"] == "given" else _threshold(manifest["held_out_share"])
    languages = manifest["languages"]
    for document in _read(recipe.corpus.train, recipe, ReadReport(), None):
        key = text_key(document.text)
        if key >= threshold and key not in keys and document.language in languages:
            yield document


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a file that `prepare_corpus` wrote.

    Raises:
        CorpusError: it is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield Document(**json.loads(line))
    except (OSError, ValueError, TypeError) as error:
        raise CorpusError(f"{path}: missing or damaged ({error}); make the corpus stage again (--from corpus)") from None


def load_manifest(corpus_folder: Path) -> dict[str, Any]:
    """`manifest.json` of the corpus stage."""
    try:
        return read_json(corpus_folder / "manifest.json", languages=dict)
    except StageError as error:
        raise CorpusError(f"{error} (--from corpus)") from None


def _threshold(share: float) -> int:
    """Keys below it are held out: keys are uniform over 64 bits."""
    return round(share * 2.0**64)


def _read(sources: Sequence[AnySource], recipe: Recipe, report: ReadReport, title: str | None) -> Iterator[Document]:
    corpus = recipe.corpus
    documents = (
        document for source in sources for document in read_source(source, corpus.fields, corpus.max_bad_share, report, corpus.languages)
    )
    if title is None or not sources:
        return documents
    return iter(tqdm(documents, desc=title, unit=" documents", file=sys.stderr, mininterval=0.5))


def _hold_out(language: _Language, key: int, document: Document) -> None:
    language.held_out_documents += 1
    language.valid.add(key, document)


def _train_on(language: _Language, key: int, document: Document) -> None:
    size = document.num_bytes
    language.train_documents += 1
    language.train_bytes += size
    language.sample.add(key, document)
    if language.smallest is not None and key != language.smallest[0]:
        language.other_keys = True
    if language.smallest is None or key < language.smallest[0]:
        language.smallest, language.smallest_count, language.smallest_bytes = (key, document), 0, 0
    if key == language.smallest[0]:
        language.smallest_count += 1
        language.smallest_bytes += size


def _hold_out_smallest(language: _Language) -> int:
    """The hash rule gave a small language nothing: hold out the text with the smallest key, and say so in the manifest."""
    assert language.smallest is not None
    key, document = language.smallest
    language.train_documents -= language.smallest_count
    language.train_bytes -= language.smallest_bytes
    language.sample.discard(key)
    _hold_out(language, key, document)
    language.smallest_key_rule = True
    return key


def _check(recipe: Recipe, found: dict[str, _Language], report: ReadReport) -> None:
    corpus = recipe.corpus
    trained = sorted(code for code, language in found.items() if language.train_documents)
    if not trained and not corpus.languages:
        raise CorpusError("corpus.train holds no documents: check the files it names")
    missing = [code for code in corpus.languages or [] if code not in trained]
    if missing:
        there = sorted({*trained, *report.skipped})
        raise CorpusError(
            f"corpus.languages asks for {', '.join(missing)}, but corpus.train has no training document in it; languages that occur: "
            f"{', '.join(there) or 'none'}. Take it out, add text, or check corpus.fields.language"
        )
    silent = [code for code in trained if not found[code].held_out_documents]
    if silent:
        way_out = (
            "add some to corpus.valid"
            if corpus.valid
            else "one text alone cannot be trained on and held out: add text, raise corpus.held_out.share or give corpus.valid"
        )
        raise CorpusError(
            f"no held-out text in {', '.join(silent)}, so nothing could be measured there: {way_out}, or name the languages "
            "to use in corpus.languages"
        )


def _counts(language: _Language) -> dict[str, int]:
    valid, sample = language.valid.documents(), language.sample.documents()
    return {
        "train_documents": language.train_documents,
        "train_bytes": language.train_bytes,
        "held_out_documents": language.held_out_documents,
        "valid_documents": len(valid),
        "valid_bytes": sum(document.num_bytes for _, document in valid),
        "sample_documents": len(sample),
        "sample_bytes": sum(document.num_bytes for _, document in sample),
    }


def _write(out: Path, languages: dict[str, _Language], keys: set[int]) -> None:
    for name in ("valid", "sample"):
        (out / name).mkdir()
        for code, language in languages.items():
            with open(out / name / f"{code}.jsonl", "w", encoding="utf-8") as file:
                for _, document in getattr(language, name).documents():
                    file.write(_line(document))
    np.save(out / "valid" / "keys.npy", np.array(sorted(keys), dtype=np.uint64))


def _line(document: Document) -> str:
    row: dict[str, Any] = {"text": document.text, "id": document.id, "language": document.language}
    if document.meta:
        # meta is taken as it comes and may hold half surrogates; as escapes they stay readable
        row["meta"] = document.meta
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"
