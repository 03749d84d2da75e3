"""Stage `tokens`: every block of the corpus is tokenised once.

Shards lie in `shards/tokens`, named by the texts of the block and the tokenizer, so another clustering tokenises nothing, another tokenizer
everything, and a longer corpus what is new. The stage's own folder holds `manifest.json`: the shards in order, and what each language has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megaxelm.corpus.document import Document
from megaxelm.corpus.executor import Progress, UnitsStep, run_units
from megaxelm.corpus.prepare import kept_documents, load_manifest, training_inputs
from megaxelm.corpus.readers import Row, Tally, read_rows
from megaxelm.corpus.scan import Block, Scan, ScanStep, hash_id
from megaxelm.corpus.sealed import finished_folder
from megaxelm.corpus.shards import SHARD_FILE, TokenShard, write_shard
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import CorpusError, StageError
from megaxelm.files import hash_value, read_json, remove, write_json
from megaxelm.recipe import Recipe

_VERSION = 2
_BATCH_BYTES = 1 << 20


class Blocks:
    """The blocks of a corpus that have documents to train on, and how to read them again.

    Args:
        shards: where the scans lie.
        block_bytes: text of a block. None: as the corpus stage made them.
    """

    def __init__(self, recipe: Recipe, corpus_folder: Path, shards: Path, block_bytes: int | None = None) -> None:
        self.recipe = recipe
        self.corpus_folder = corpus_folder
        self.used = frozenset(load_manifest(corpus_folder)["languages"])
        self.step: ScanStep
        self.scans: list[Scan]
        self.step, self.scans = training_inputs(recipe, corpus_folder, shards, block_bytes)
        self.blocks = [block for scan in self.scans for block in scan.blocks() if self.kept(block).any()]

    def kept(self, block: Block) -> NDArray[np.bool_]:
        """Which documents of a block are trained on, [documents]."""
        return kept_documents(self.corpus_folder, self.scans[block.input], block)

    def array(self, block: Block, name: str) -> NDArray[Any]:
        """`keys`, `languages` or `sizes` of the documents of a block that are trained on."""
        return np.asarray(self.scans[block.input].array(name)[block.first : block.first + block.documents])[self.kept(block)]

    def languages(self, block: Block) -> list[str]:
        """Languages of the documents of a block that are trained on."""
        names = self.scans[block.input].languages
        return [names[number] for number in self.array(block, "languages").tolist()]

    def rows(self, block: Block) -> Iterator[Row]:
        """The documents of a block that are trained on, in their order.

        Raises:
            CorpusError: they are not those that were scanned.
        """
        item = self.step.inputs[block.input]
        tally = Tally(item.name, self.recipe.corpus)
        digest = xxhash.xxh3_128()
        found = 0
        for row, kept in zip(
            islice(read_rows(item, self.step.sources[item.source], tally, block.mark), block.documents), self.kept(block), strict=False
        ):
            data = row.text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
            found += 1
            if kept:
                yield row
        if found != block.documents or digest.hexdigest() != block.text_hash:
            # the name of a scan does not tell such changes, so it would be taken for this file's again
            self.scans[block.input].forget()
            raise CorpusError(f"{item.name}: has changed since the corpus stage read it; start again with --from corpus")

    def documents(self, block: Block) -> Iterator[Document]:
        """`rows` as documents with their text; errors as `rows`."""
        for row, language in zip(self.rows(block), self.languages(block), strict=False):
            yield Document(row.text, row.id or hash_id(row.text, language), language, row.meta)


class TokensStep(UnitsStep):
    """Tokenises blocks, one a unit."""

    name = "tokens"
    size_is_text = True

    def __init__(self, blocks: Blocks, tokenizer_folder: Path, store: Path, reports: Path) -> None:
        super().__init__(len(blocks.blocks), reports)
        self.blocks = blocks
        self.tokenizer_folder = tokenizer_folder
        self.store = store
        tokenizer = Tokenizer.load(tokenizer_folder)
        self.keys = [self._key(block, tokenizer) for block in blocks.blocks]
        self._tokenizer: Tokenizer | None = None

    def _key(self, block: Block, tokenizer: Tokenizer) -> str:
        kept = xxhash.xxh3_128_hexdigest(np.packbits(self.blocks.kept(block)).tobytes())
        numbers = xxhash.xxh3_128_hexdigest(self.blocks.array(block, "languages").tobytes())
        names = self.blocks.scans[block.input].languages
        return hash_value([_VERSION, block.text_hash, kept, numbers, names, tokenizer.fingerprint, tokenizer.begin_of_document])

    def size(self, unit: int) -> int:
        return self.blocks.blocks[unit].num_bytes

    def is_done(self, unit: int) -> bool:
        return (self.store / self.keys[unit] / SHARD_FILE).exists()

    def do(self, unit: int, progress: Progress) -> None:
        """Tokenise one block."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.tokenizer_folder)
        with finished_folder(self.store / self.keys[unit], lambda: self.is_done(unit)) as out:
            self._write(self._tokenizer, self.blocks.blocks[unit], out, progress)

    def _write(self, tokenizer: Tokenizer, block: Block, out: Path, progress: Progress) -> None:
        tokens: list[NDArray[np.int32]] = []
        keys, sizes = self.blocks.array(block, "keys"), self.blocks.array(block, "sizes")
        for batch in _batches(self.blocks.rows(block)):
            found = [np.array(tokenizer.document(ids), np.int32) for ids in tokenizer.encode(batch)]
            done = len(tokens)
            tokens += found
            progress.add(documents=len(found), bytes=int(sizes[done : len(tokens)].sum()), tokens=sum(map(len, found)))
        write_shard(out, tokenizer.vocab_size, self.blocks.languages(block), tokens, keys, sizes)


def build_tokens(recipe: Recipe, corpus_folder: Path, tokenizer_folder: Path, shards: Path, out: Path) -> None:
    """Tokenise the blocks of the corpus that have no shard yet, and write the stage into the existing folder `out`.

    Raises:
        CorpusError: the source has changed since the corpus stage read it.
    """
    blocks = Blocks(recipe, corpus_folder, shards, recipe.executor.block_bytes)
    step = TokensStep(blocks, tokenizer_folder, shards / "tokens", shards / "reports" / "tokens")
    run_units(step, recipe.executor, "tokens")
    tokenizer = Tokenizer.load(tokenizer_folder)
    languages: dict[str, dict[str, int]] = {}
    for key in step.keys:
        for section in TokenShard(shards / "tokens" / key).sections:
            counts = languages.setdefault(section.language, {"documents": 0, "tokens": 0, "bytes": 0})
            counts["documents"] += section.documents
            counts["tokens"] += section.tokens
            counts["bytes"] += section.num_bytes
    _check_counts(languages, load_manifest(corpus_folder)["languages"])
    manifest = {
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "vocab_size": tokenizer.vocab_size,
        "begin": len(tokenizer.document([])) - 1,
        "languages": dict(sorted(languages.items())),
        "block_bytes": recipe.executor.block_bytes,
        "shards": step.keys,
    }
    write_json(out / "manifest.json", manifest)
    _forget(shards / "tokens", step.keys)


def _check_counts(found: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> None:
    """Nothing lost, nothing twice: what the shards hold is what the corpus stage counted."""
    for language in sorted({*found, *expected}):
        has = {unit: found.get(language, {}).get(unit, 0) for unit in ("documents", "bytes")}
        wanted = {unit: expected.get(language, {}).get(f"train_{unit}", 0) for unit in ("documents", "bytes")}
        if has != wanted:
            raise CorpusError(
                f"{language}: the token shards hold {has}, the corpus stage counted {wanted}: its folder is damaged; start again with "
                "--from corpus"
            )


def load_tokens(tokens_folder: Path) -> dict[str, Any]:
    """`manifest.json` of the stage.

    It holds `tokenizer`, `vocab_size`, `begin` (special tokens in front), `languages`, `block_bytes`, `shards` in order.
    """
    try:
        return read_json(
            tokens_folder / "manifest.json", languages=dict, shards=list, vocab_size=int, begin=int, tokenizer=dict, block_bytes=int
        )
    except StageError as error:
        raise StageError(f"{error} (--from tokens)") from None


def _batches(rows: Iterator[Row]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for row in rows:
        batch.append(row.text)
        size += len(row.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _forget(store: Path, used: Sequence[str]) -> None:
    """Shards of an earlier text or tokenizer, and what killed workers left."""
    names = set(used)
    for path in store.iterdir():
        if path.name not in names:
            remove(path)
