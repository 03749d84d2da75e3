"""Stage `corpus`: every input is scanned once, and what the scans found becomes the split, the sample and the list of blocks.

    manifest.json             languages and their counts, sources, scans of the training inputs in order
    kept/<input>.npy          which documents of an input are trained on, one bit each
    valid/<language>.jsonl    held-out documents
    sample/<language>.jsonl   training documents to fit tokenizer and partitioner on

The training text is not copied. Sample and held-out documents are those with the smallest text keys, which is a random choice over the
whole corpus that does not depend on its order. Scans lie in `shards/scan`, named by what they are made from, so a killed run, or one
with another input added, scans only what is new.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.corpus.deduplicate import BucketsStep, near_repeated, repeated
from megaxelm.corpus.document import Document
from megaxelm.corpus.executor import run_units
from megaxelm.corpus.inputs import AnySource, Input, list_inputs
from megaxelm.corpus.readers import MAX_EXAMPLES, check_language, describe_source, judge_share
from megaxelm.corpus.scan import SKIPPED, Block, Scan, ScanStep, held_out_threshold, write_documents
from megaxelm.corpus.smallest import SmallestKeys
from megaxelm.errors import CorpusError, StageError
from megaxelm.files import hash_value, read_json, remove
from megaxelm.recipe import Recipe


@dataclass
class _Language:
    sample: SmallestKeys[Document]
    valid: SmallestKeys[Document]
    train_documents: int = 0
    train_bytes: int = 0
    held_out_documents: int = 0
    smallest: tuple[int, Document] | None = None
    smallest_key_rule: bool = False


@dataclass
class _Split:
    """What is trained on, an input each, and what else the scans say."""

    kept: list[NDArray[np.bool_]] = field(default_factory=list)
    duplicates: int = 0
    of_valid: int = 0


def prepare_corpus(recipe: Recipe, shards: Path, out: Path) -> None:
    """Scan what is new into `shards` and write the stage into the existing folder `out`.

    Raises:
        CorpusError: what cannot be read; no documents; a language without training or without held-out text.
    """
    corpus = recipe.corpus
    for code in corpus.languages or []:
        check_language(code, "corpus.languages")
    valid_step = ScanStep(recipe, "valid", list_inputs(corpus.valid), shards / "scan", shards / "reports" / "scan")
    valid = _run_scan(recipe, valid_step)
    keys_file = _given_keys(valid, shards) if corpus.valid else None
    step = _train_step(recipe, shards, keys_file)
    inputs, train = step.inputs, _run_scan(recipe, step)
    _judge(recipe, inputs, train)
    found = _languages(recipe, valid, train)
    if lacking := [scan for scan in [*valid, *train] if _lacks_candidates(scan, found)]:
        for scan in lacking:
            scan.forget()
        valid, train = _run_scan(recipe, valid_step), _run_scan(recipe, step)
        found = _languages(recipe, valid, train)
    split = _split(recipe, train, None if keys_file is None else np.load(keys_file), shards)
    _hold_out_smallest(recipe, found, train, split)
    _count(found, train, split.kept)
    _check(recipe, found, _skipped(train), split)
    used = {code: language for code, language in sorted(found.items()) if language.train_documents}
    for name in ("valid", "sample"):
        (out / name).mkdir()
        for code, language in used.items():
            chosen: SmallestKeys[Document] = getattr(language, name)
            write_documents(out / name / f"{code}.jsonl", ((key, item) for key, _, item in chosen.items()), with_key=False)
    (out / "kept").mkdir()
    for scan, kept in zip(train, split.kept, strict=True):
        np.save(_kept_file(out, scan), np.packbits(kept))
    manifest = _manifest(recipe, inputs, used, found, train, valid, split)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _forget_scans(shards, [*train, *valid], keys_file)


def training_inputs(recipe: Recipe, corpus_folder: Path, shards: Path, block_bytes: int | None = None) -> tuple[ScanStep, list[Scan]]:
    """The training inputs with their scans, as the stage left them; `block_bytes` other than the stage's: scanned again for such blocks.

    Raises:
        CorpusError: the sources have changed since.
    """
    manifest = load_manifest(corpus_folder, scans=list, contents=list, block_bytes=int)
    keys = shards / "scan" / f"valid-{manifest['valid_keys']}.npy" if manifest["valid_keys"] else None
    try:
        step = _train_step(_with_blocks(recipe, manifest["block_bytes"]), shards, keys)
    except FileNotFoundError:
        raise CorpusError(f"{keys}: missing; make the corpus stage again (--from corpus)") from None
    if step.keys != manifest["scans"]:
        changed = [item.name for item, key in zip(step.inputs, step.keys, strict=True) if key not in manifest["scans"]]
        raise CorpusError(
            f"corpus.train has changed since the corpus stage read it ({', '.join(changed[:3]) or 'another order'}): start again with "
            "--from corpus"
        )
    if block_bytes not in (None, manifest["block_bytes"]):
        step = _train_step(_with_blocks(recipe, block_bytes), shards, keys)
        run_units(step, recipe.executor, "blocks of another size")
    missing = [step.inputs[unit].name for unit in range(step.count) if not step.is_done(unit)]
    if missing:
        raise CorpusError(f"{shards / 'scan'}: the scan of {missing[0]} is missing; make the corpus stage again (--from corpus)")
    scans = [step.scan(unit) for unit in range(step.count)]
    for scan, content in zip(scans, manifest["contents"], strict=True):
        if scan.content != content:
            scan.forget()
            raise CorpusError(f"{scan.result['name']}: has changed since the corpus stage read it; start again with --from corpus")
    return step, scans


def kept_documents(corpus_folder: Path, scan: Scan, block: Block) -> NDArray[np.bool_]:
    """Which documents of a block are trained on, [documents].

    Raises:
        CorpusError: the file is missing or damaged.
    """
    path = _kept_file(corpus_folder, scan)
    try:
        bits = np.load(path, mmap_mode="r", allow_pickle=False)
        low, shift = divmod(block.first, 8)
        part = np.unpackbits(bits[low : -(-(block.first + block.documents) // 8)])[shift : shift + block.documents]
        if len(part) != block.documents:
            raise ValueError(f"{len(bits)} bytes")
        return part.astype(bool)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise CorpusError(f"{path}: missing or damaged ({error}); make the corpus stage again (--from corpus)") from None


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


def load_manifest(corpus_folder: Path, **fields: type) -> dict[str, Any]:
    """`manifest.json` of the corpus stage, with `languages` and whatever else is asked for, of the types given."""
    try:
        return read_json(corpus_folder / "manifest.json", languages=dict, **fields)
    except StageError as error:
        raise CorpusError(f"{error} (--from corpus)") from None


def _kept_file(corpus_folder: Path, scan: Scan) -> Path:
    # by number: equal inputs share a scan, and of repeated texts only the first input keeps its own
    return corpus_folder / "kept" / f"{scan.number:05d}.npy"


def _with_blocks(recipe: Recipe, block_bytes: int | None) -> Recipe:
    return recipe.model_copy(update={"executor": recipe.executor.model_copy(update={"block_bytes": block_bytes})})


def _train_step(recipe: Recipe, shards: Path, keys_file: Path | None) -> ScanStep:
    return ScanStep(recipe, "train", list_inputs(recipe.corpus.train), shards / "scan", shards / "reports" / "scan", keys_file)


def _run_scan(recipe: Recipe, step: ScanStep) -> list[Scan]:
    run_units(step, recipe.executor, "corpus: held-out text" if step.role == "valid" else "corpus: training text")
    return [step.scan(unit) for unit in range(step.count)]


def _given_keys(valid: Sequence[Scan], shards: Path) -> Path:
    """Sorted keys of the held-out texts that were given, in a file named by its content."""
    keys = np.unique(np.concatenate([np.asarray(scan.array("keys"))[scan.array("languages") != SKIPPED] for scan in valid]))
    path = shards / "scan" / f"valid-{hash_value([scan.folder.name for scan in valid])}.npy"
    if not path.exists():
        aside = path.with_name(f".{path.name}")
        with open(aside, "wb") as file:
            np.save(file, keys)
        aside.rename(path)
    return path


def _judge(recipe: Recipe, inputs: Sequence[Input], scans: Sequence[Scan]) -> None:
    """Text files are judged a source at a time: one of them is one document."""
    for number in {item.source for item in inputs if item.kind == "text"}:
        results = [scan.result for item, scan in zip(inputs, scans, strict=True) if item.source == number and item.kind == "text"]
        total, broken = (sum(result[name] for result in results) for name in ("total", "broken"))
        examples = [example for result in results for example in result["examples"]]
        judge_share(f"text files of source {number + 1}", total, broken, examples, recipe.corpus.max_bad_share)


def _languages(recipe: Recipe, valid: Sequence[Scan], train: Sequence[Scan]) -> dict[str, _Language]:
    """Sample and held-out documents of every language, from the candidates of all scans in order."""
    corpus = recipe.corpus
    found: dict[str, _Language] = {}

    def of(code: str) -> _Language:
        if code not in found:
            found[code] = _Language(SmallestKeys(corpus.sample_bytes), SmallestKeys(corpus.valid_bytes))
        return found[code]

    for scan in [*valid, *train]:
        for name in ("sample", "valid"):
            for key, document in scan.candidates(name):
                getattr(of(document.language), name).add(key, document, document.num_bytes)
        for key, document in scan.candidates("smallest"):
            language = of(document.language)
            if language.smallest is None or key < language.smallest[0]:
                language.smallest = key, document
    for scan in valid:
        for code, count in _by_language(scan, np.ones(scan.result["documents"], bool)).items():
            of(code).held_out_documents += count[0]
    threshold = held_out_threshold(recipe)
    for scan in train if threshold else ():
        for code, count in _by_language(scan, np.asarray(scan.array("keys")) < np.uint64(threshold)).items():
            of(code).held_out_documents += count[0]
    return found


def _lacks_candidates(scan: Scan, found: dict[str, _Language]) -> bool:
    """Whether a scan was bounded by inputs that are no longer there, so that it left out what now has a place."""
    return any(
        scan.misses(name, code, getattr(found[code], name).bound)
        for code in scan.languages
        if code in found
        for name in ("sample", "valid")
    )


def _by_language(scan: Scan, which: NDArray[np.bool_]) -> dict[str, tuple[int, int]]:
    """Documents and bytes by language of the documents `which` [documents] of a scan."""
    numbers = np.asarray(scan.array("languages"))
    which = which & (numbers != SKIPPED)
    kinds = len(scan.languages)
    documents = np.bincount(numbers[which], minlength=kinds)
    sizes = np.bincount(numbers[which], weights=np.asarray(scan.array("sizes"))[which], minlength=kinds)
    return {code: (int(documents[i]), int(sizes[i])) for i, code in enumerate(scan.languages) if documents[i]}


def _split(recipe: Recipe, train: Sequence[Scan], given: NDArray[np.uint64] | None, shards: Path) -> _Split:
    """Which documents are trained on: not held out, not repeated."""
    split = _Split()
    threshold = np.uint64(held_out_threshold(recipe))
    for scan in train:
        keys = np.asarray(scan.array("keys"))
        kept = (keys >= threshold) & (np.asarray(scan.array("languages")) != SKIPPED)
        if given is not None:
            in_valid = kept & np.isin(keys, given)
            split.of_valid += int(in_valid.sum())
            kept &= ~in_valid
        split.kept.append(kept)
    if recipe.corpus.deduplicate is None:
        return split
    # near-duplicates are found by words, so texts too short for that are compared whole
    groups = [repeated([(scan.array("keys"), kept) for scan, kept in zip(train, split.kept, strict=True)])]
    if recipe.corpus.deduplicate == "minhash":
        work = shards / "minhash"
        remove(work)
        folders = [scan.folder / "minhash" for scan in train]
        step = BucketsStep(folders, recipe.corpus.minhash, work, shards / "reports" / "minhash")
        run_units(step, recipe.executor, "corpus: near-duplicates")
        groups.append(near_repeated(folders, recipe.corpus.minhash, work))
        remove(work)
    for group in groups:
        for kept, places in zip(split.kept, group, strict=True):
            split.duplicates += int(kept[places].sum())
            kept[places] = False
    return split


def _hold_out_smallest(recipe: Recipe, found: dict[str, _Language], train: Sequence[Scan], split: _Split) -> None:
    """Where the hash rule gave a small language nothing, hold out the text with the smallest key, and say so in the manifest."""
    if recipe.corpus.valid:
        return
    for code, language in sorted(found.items()):
        if language.held_out_documents or language.smallest is None:
            continue
        key, document = language.smallest
        others = False
        for scan, kept in zip(train, split.kept, strict=True):
            if code in scan.languages:
                mine = kept & (np.asarray(scan.array("languages")) == scan.languages.index(code))
                others = others or bool((np.asarray(scan.array("keys"))[mine] != np.uint64(key)).any())
        if not others:
            continue
        for scan, kept in zip(train, split.kept, strict=True):
            # the text is left out of every language
            kept &= np.asarray(scan.array("keys")) != np.uint64(key)
        for other in found.values():
            other.sample.discard(key)
        language.valid.add(key, document, document.num_bytes)
        language.held_out_documents += 1
        language.smallest_key_rule = True


def _count(found: dict[str, _Language], train: Sequence[Scan], kept: Sequence[NDArray[np.bool_]]) -> None:
    for scan, mask in zip(train, kept, strict=True):
        for code, (documents, size) in _by_language(scan, mask).items():
            found[code].train_documents += documents
            found[code].train_bytes += size


def _skipped(scans: Sequence[Scan]) -> Counter[str]:
    total: Counter[str] = Counter()
    for scan in scans:
        total.update(scan.result["skipped"])
    return total


def _check(recipe: Recipe, found: dict[str, _Language], skipped: Counter[str], split: _Split) -> None:
    corpus = recipe.corpus
    trained = sorted(code for code, language in found.items() if language.train_documents)
    if not trained and not corpus.languages:
        why = "holds no documents: check the files it names"
        if split.of_valid:
            why = f"holds nothing but the texts of corpus.valid ({split.of_valid} documents): give other text to train on"
        raise CorpusError(f"corpus.train {why}")
    missing = [code for code in corpus.languages or [] if code not in trained]
    if missing:
        there = sorted({*trained, *skipped})
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


def _manifest(
    recipe: Recipe,
    inputs: Sequence[Input],
    used: dict[str, _Language],
    found: dict[str, _Language],
    train: Sequence[Scan],
    valid: Sequence[Scan],
    split: _Split,
) -> dict[str, Any]:
    corpus = recipe.corpus
    valid_inputs = list_inputs(corpus.valid)
    scans = [*train, *valid]

    def described(sources: Sequence[AnySource], items: Sequence[Input]) -> list[dict[str, Any]]:
        groups = [[item for item in items if item.source == number] for number in range(len(sources))]
        return [entry for source, group in zip(sources, groups, strict=True) for entry in describe_source(source, group)]

    return {
        "languages": {code: _counts(language) for code, language in used.items()},
        "held_out": "given" if corpus.valid else "hash",
        "held_out_share": None if corpus.valid else corpus.held_out.share,
        "held_out_by_smallest_key": [code for code, language in used.items() if language.smallest_key_rule],
        "duplicates_of_valid": split.of_valid,
        "duplicates": split.duplicates,
        "skipped_languages": dict(sorted(_skipped(scans).items())),
        "valid_without_training": {code: item.held_out_documents for code, item in sorted(found.items()) if code not in used},
        "broken": {
            "count": sum(scan.result["broken"] for scan in scans),
            "examples": [example for scan in scans for example in scan.result["examples"]][:MAX_EXAMPLES],
        },
        "sources": {"train": described(corpus.train, inputs), "valid": described(corpus.valid, valid_inputs)},
        "scans": [scan.folder.name for scan in train],
        "contents": [scan.content for scan in train],
        "block_bytes": recipe.executor.block_bytes,
        "valid_keys": hash_value([scan.folder.name for scan in valid]) if corpus.valid else None,
    }


def _counts(language: _Language) -> dict[str, int]:
    valid, sample = language.valid.items(), language.sample.items()
    return {
        "train_documents": language.train_documents,
        "train_bytes": language.train_bytes,
        "held_out_documents": language.held_out_documents,
        "valid_documents": len(valid),
        "valid_bytes": sum(size for _, size, _ in valid),
        "sample_documents": len(sample),
        "sample_bytes": sum(size for _, size, _ in sample),
    }


def _forget_scans(shards: Path, used: Sequence[Scan], keys_file: Path | None) -> None:
    """Scans and keys of what is no longer in the corpus, and what killed workers left."""
    names = {scan.folder.name for scan in used} | ({keys_file.name} if keys_file else set())
    for path in (shards / "scan").iterdir():
        if path.name not in names:
            remove(path)
