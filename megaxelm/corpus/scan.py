"""The first reading of an input: what documents it holds, where its blocks begin, and the candidates for sample and held-out text.

A block is a run of documents of one input, up to `executor.block_bytes` of text: what one worker tokenises at a time. The result of a scan
lies under a name made from the content of the input and the settings that matter, so nothing is scanned twice:

    result.json        counts, blocks, languages, and the hashes of the other files
    keys.npy           uint64 [documents], text keys
    languages.npy      uint16 [documents], numbers in `languages`; SKIPPED for a language that was not asked for
    sizes.npy          uint32 [documents], UTF-8 bytes
    sample.jsonl, valid.jsonl, smallest.jsonl    candidates, each with its key
    minhash/           signatures, where near-duplicates are looked for
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megaxelm.corpus.deduplicate import Signatures
from megaxelm.corpus.detect import Detector
from megaxelm.corpus.document import Document, text_key
from megaxelm.corpus.executor import Progress, UnitsStep
from megaxelm.corpus.inputs import AnySource, Input
from megaxelm.corpus.readers import Mark, Row, Tally, check_language, read_rows
from megaxelm.corpus.sealed import finished_folder, read_sealed, write_sealed
from megaxelm.corpus.smallest import SmallestKeys
from megaxelm.errors import CorpusError, StageError
from megaxelm.files import hash_value
from megaxelm.recipe import CatalogSource, CorpusConfig, Recipe, result_settings

SKIPPED = 0xFFFF
RESULT_FILE = "result.json"
_VERSION = 2
_FILES = ("keys.npy", "languages.npy", "sizes.npy", "sample.jsonl", "valid.jsonl", "smallest.jsonl")
_REPORT_DOCUMENTS = 500


@dataclass(frozen=True)
class Block:
    """A run of documents of one input."""

    input: int
    """Number of the input."""
    mark: Mark
    """Where it begins."""
    first: int
    """Documents of the input before it."""
    documents: int
    num_bytes: int
    """UTF-8 bytes of all its documents."""
    text_hash: str
    """Of all its texts, in order."""


class Scan:
    """The finished scan of an input.

    Raises:
        CorpusError: a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.number = number
        try:
            self.result = read_sealed(folder, RESULT_FILE)
        except StageError as error:
            raise CorpusError(
                f"scan {folder}: damaged ({error}); remove it and start again with --from corpus: only what is missing is scanned"
            ) from None
        self.languages: list[str] = self.result["languages"]

    @property
    def content(self) -> str:
        """Hash of the keys, languages and sizes of all documents."""
        return hash_value([self.result["files"][f"{name}.npy"] for name in ("keys", "languages", "sizes")] + self.languages)

    def array(self, name: str) -> NDArray[Any]:
        """`keys`, `languages` or `sizes` of all documents."""
        found: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return found

    def blocks(self) -> list[Block]:
        """Its blocks in order."""
        return [
            Block(self.number, Mark(*item["mark"]), item["first"], item["documents"], item["bytes"], item["text_hash"])
            for item in self.result["blocks"]
        ]

    def candidates(self, name: str) -> Iterator[tuple[int, Document]]:
        """(key, document) of `sample`, `valid` or `smallest`."""
        with open(self.folder / f"{name}.jsonl", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield row.pop("key"), Document(**row)

    def misses(self, name: str, language: str, bound: int | None) -> bool:
        """Whether candidates with keys below `bound` (None: any) may be lacking, because other inputs had left no place for them."""
        own = self.result["bounds"].get(name, {}).get(language)
        return own is not None and (bound is None or own < bound)

    def forget(self) -> None:
        """Make the scan count as not done."""
        (self.folder / RESULT_FILE).unlink(missing_ok=True)


class ScanStep(UnitsStep):
    """Scans inputs, one a unit.

    Args:
        role: `train`, or `valid`, where every document is held out.
        valid_keys: file of the sorted keys of the held-out texts that were given; None where a share of `train` is held out.
    """

    name = "scan"

    def __init__(
        self,
        recipe: Recipe,
        role: str,
        inputs: Sequence[Input],
        store: Path,
        reports: Path,
        valid_keys: Path | None = None,
    ) -> None:
        super().__init__(len(inputs), reports)
        self.recipe = recipe
        self.role = role
        self.inputs = list(inputs)
        self.store = store
        self.valid_keys = valid_keys
        corpus = recipe.corpus
        self.sources: list[AnySource] = list(corpus.train if role == "train" else corpus.valid)
        self.threshold = held_out_threshold(recipe) if role == "train" else 1 << 64
        given = None if valid_keys is None else xxhash.xxh3_128_hexdigest(valid_keys.read_bytes())
        self.keys = [self._key(item, given) for item in self.inputs]
        self._detector: Detector | None = None
        self._seen: dict[tuple[str, str], SmallestKeys[None]] = {}

    def _key(self, item: Input, given: str | None) -> str:
        """Name of the result: what it is made from."""
        corpus = self.recipe.corpus
        settings = result_settings(corpus)
        for name in ("train", "valid", "held_out"):
            del settings[name]
        source = result_settings(self.sources[item.source])
        source.pop("files", None)
        return hash_value(
            [_VERSION, settings, self.role, str(self.threshold), given, source, item.kind, item.name, item.value, item.part]
            + [self.recipe.executor.block_bytes]
        )

    def scan(self, unit: int) -> Scan:
        """The finished scan of a unit."""
        return Scan(self.store / self.keys[unit], unit)

    def size(self, unit: int) -> int:
        """Bytes of the input as it is stored, where that is known."""
        size, colon, _ = self.inputs[unit].value.partition(":")
        return int(size) if colon and size.isdigit() else 0

    def is_done(self, unit: int) -> bool:
        return (self.store / self.keys[unit] / RESULT_FILE).exists()

    def do(self, unit: int, progress: Progress) -> None:
        """Scan one input."""
        with finished_folder(self.store / self.keys[unit], lambda: self.is_done(unit)) as out:
            self._scan(self.inputs[unit], out, progress)

    def _scan(self, item: Input, out: Path, progress: Progress) -> None:
        corpus = self.recipe.corpus
        bounds = {place: seen.bound for place, seen in self._seen.items() if seen.bound is not None}
        work = _Work(corpus, self.threshold, self.recipe.executor.block_bytes, self._valid_keys(), bounds, self._detect)
        tally = Tally(item.name, corpus)
        rows = read_rows(item, self.sources[item.source], tally)
        documents = work.documents(rows, item.name, progress)
        if corpus.deduplicate == "minhash" and self.role == "train":
            Signatures(out / "minhash", corpus.minhash).write(documents)
        else:
            for _ in documents:
                pass
        work.write(out)
        self._tighten(work.chosen)
        counts = {"total": tally.total, "broken": tally.broken, "examples": tally.examples}
        write_sealed(out, RESULT_FILE, work.result(item.name) | counts, _FILES)

    def _valid_keys(self) -> NDArray[np.uint64]:
        return np.zeros(0, np.uint64) if self.valid_keys is None else np.load(self.valid_keys)

    def _tighten(self, chosen: dict[tuple[str, str], SmallestKeys[Document]]) -> None:
        """What one worker has chosen so far bounds what is worth keeping of its next inputs, or the candidates would copy the corpus."""
        for place, kept in chosen.items():
            seen = self._seen.setdefault(place, SmallestKeys(kept.max_bytes))
            for key, size, _ in kept.items():
                seen.add(key, None, size)
            if kept.bound is not None:
                seen.bound = kept.bound if seen.bound is None else min(kept.bound, seen.bound)

    def _detect(self, text: str) -> str:
        if self._detector is None:
            corpus = self.recipe.corpus
            given = {source.language for source in [*corpus.train, *corpus.valid] if not isinstance(source, CatalogSource)}
            self._detector = Detector(corpus.languages, [code for code in given if code is not None])
        return self._detector.detect(text)


class _Work:
    """What accumulates while one input is scanned: 14 bytes a document, and bounded candidates."""

    def __init__(
        self,
        corpus: CorpusConfig,
        threshold: int,
        block_bytes: int,
        valid_keys: NDArray[np.uint64],
        bounds: dict[tuple[str, str], int],
        detect: Any,
    ) -> None:
        self.corpus, self.threshold, self.block_bytes, self.valid_keys, self.bounds = corpus, threshold, block_bytes, valid_keys, bounds
        self.detect = detect
        self.asked = None if corpus.languages is None else frozenset(corpus.languages)
        self.numbers: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.keys, self.languages, self.sizes = array("Q"), array("H"), array("I")
        self.chosen: dict[tuple[str, str], SmallestKeys[Document]] = {}
        """By `sample` or `valid`, and language."""
        self.smallest: dict[str, tuple[int, Document]] = {}
        self.blocks: list[dict[str, Any]] = []
        self._hash = xxhash.xxh3_128()

    def documents(self, rows: Iterator[Row], name: str, progress: Progress) -> Iterator[tuple[int, str]]:
        """(number, text) of the training documents, while everything is counted."""
        unreported = [0, 0]
        for row in rows:
            data = row.text.encode("utf-8")
            language = row.language or self.detect(row.text)
            key = text_key(row.text)
            self._count(row, language, key, data, name)
            if self.languages[-1] != SKIPPED and self._choose(row, language, key, len(data)):
                yield len(self.keys) - 1, row.text
            unreported[0] += 1
            unreported[1] += len(data)
            if unreported[0] == _REPORT_DOCUMENTS:
                progress.add(documents=unreported[0], bytes=unreported[1])
                unreported = [0, 0]
        self._end_block()
        progress.add(documents=unreported[0], bytes=unreported[1])

    def _count(self, row: Row, language: str, key: int, data: bytes, name: str) -> None:
        if not self.blocks or self.blocks[-1]["bytes"] + len(data) > self.block_bytes:
            self._end_block()
            self.blocks.append({"mark": list(row.mark), "first": len(self.keys), "documents": 0, "bytes": 0})
        block = self.blocks[-1]
        block["documents"] += 1
        block["bytes"] += len(data)
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)
        if self.asked is not None and language not in self.asked:
            self.skipped[language] += 1
            number = SKIPPED
        elif language in self.numbers:
            number = self.numbers[language]
        else:
            check_language(language, f"{name}{', ' if row.place else ''}{row.place}")
            number = self.numbers[language] = len(self.numbers)
            if number >= SKIPPED:
                raise CorpusError(f"{name}: more than {SKIPPED - 1} languages; check corpus.fields.language")
        self.keys.append(key)
        self.languages.append(number)
        self.sizes.append(len(data))

    def _end_block(self) -> None:
        if self.blocks:
            self.blocks[-1]["text_hash"] = self._hash.hexdigest()
        self._hash = xxhash.xxh3_128()

    def _choose(self, row: Row, language: str, key: int, size: int) -> bool:
        """Offer the document to sample or held-out text; whether it may be trained on."""
        held_out = key < self.threshold
        place = int(np.searchsorted(self.valid_keys, np.uint64(key))) if len(self.valid_keys) else 0
        if not held_out and place < len(self.valid_keys) and int(self.valid_keys[place]) == key:
            return False  # a text of corpus.valid
        name, limit = ("valid", self.corpus.valid_bytes) if held_out else ("sample", self.corpus.sample_bytes)
        chosen = self.chosen.get((name, language))
        if chosen is None:
            chosen = self.chosen[name, language] = SmallestKeys(limit, self.bounds.get((name, language)))
        is_smallest = not held_out and (language not in self.smallest or key < self.smallest[language][0])
        if is_smallest or chosen.bound is None or key < chosen.bound:
            # the id does not depend on where the document was found
            document = Document(row.text, row.id or hash_id(row.text, language), language, row.meta)
            chosen.add(key, document, size)
            if is_smallest:
                self.smallest[language] = key, document
        return not held_out

    def write(self, out: Path) -> None:
        for name, values, kind in (("keys", self.keys, "u8"), ("languages", self.languages, "u2"), ("sizes", self.sizes, "u4")):
            np.save(out / f"{name}.npy", np.frombuffer(values, dtype=kind) if values else np.zeros(0, kind))
        for name in ("sample", "valid"):
            groups = [self.chosen[place] for place in sorted(self.chosen) if place[0] == name]
            write_documents(out / f"{name}.jsonl", ((key, document) for group in groups for key, _, document in group.items()))
        write_documents(out / "smallest.jsonl", (self.smallest[language] for language in sorted(self.smallest)))

    def result(self, name: str) -> dict[str, Any]:
        bounds: dict[str, dict[str, int]] = {}
        for kind, language in self.chosen.keys() & self.bounds.keys():
            bounds.setdefault(kind, {})[language] = self.bounds[kind, language]
        return {
            "bounds": bounds,
            "name": name,
            "documents": len(self.keys),
            "languages": list(self.numbers),
            "skipped": dict(sorted(self.skipped.items())),
            "blocks": self.blocks,
        }


def held_out_threshold(recipe: Recipe) -> int:
    """Training documents with keys below it are held out; keys are uniform over 64 bits. 0 where held-out text is given."""
    return 0 if recipe.corpus.valid else round(recipe.corpus.held_out.share * 2.0**64)


def hash_id(text: str, language: str) -> str:
    """The id of a document that came without one: hex of xxh3_64 over language and text."""
    return xxhash.xxh3_64_hexdigest(f"{language}\0{text}".encode())


def write_documents(path: Path, documents: Iterator[tuple[int, Document]], with_key: bool = True) -> None:
    """One JSON line a document, read back by `Document(**row)`."""
    with open(path, "w", encoding="utf-8") as file:
        for key, document in documents:
            row: dict[str, Any] = {"key": key} if with_key else {}
            row |= {"text": document.text, "id": document.id, "language": document.language}
            if document.meta:
                row["meta"] = document.meta
            line = json.dumps(row, ensure_ascii=False)
            try:
                line.encode("utf-8")
            except UnicodeEncodeError:
                # meta is taken as it comes and may hold half surrogates; as escapes they stay readable
                line = json.dumps(row)
            file.write(line + "\n")
