"""From JSON lines to a token index: ours against Megatron's way, a pool of processes that encode a document at a time.

    python benchmarks/tokenising.py [--corpus 'texts/*.jsonl.zst'] [--tokenizer run/tokenizer] [--megabytes 60] [--workers 2] [--repeats 3]

Without --corpus the text is what the installed packages Django and wagtail bring in their message catalogs, repeated up to the size;
without --tokenizer one of 8192 pieces is trained on it. The peer follows Megatron-LM's tools/preprocess_data.py: workers parse a line and
encode its text, one process takes their ids in order and writes them with megatron-core's own builder. It runs twice, with both encoders
that Megatron has for such a tokenizer: SentencePiece on tokenizer.model, and `tokenizers` on tokenizer.json. Ours is the stage `tokens`
and the merge into one index a language; the scan before it (validation, split, hashes), which the peer has no like of, is told apart.
All take the same documents, turn by turn, with the same number of workers. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megaxelm.corpus.executor import run_units
from megaxelm.corpus.inputs import chunks, list_inputs
from megaxelm.corpus.merge import MergeStep
from megaxelm.corpus.prepare import prepare_corpus
from megaxelm.corpus.readers import Tally, read_rows
from megaxelm.corpus.shards import TokenShard
from megaxelm.corpus.token_index import TokenIndex, token_dtype
from megaxelm.corpus.tokenizer import Tokenizer, build_tokenizer
from megaxelm.corpus.tokens import build_tokens, load_tokens
from megaxelm.recipe import Recipe, parse_recipe

_encoder: Callable[[str], list[int]]
_frame: tuple[list[int], list[int]]


def write_corpus(folder: Path, pattern: str | None, megabytes: float) -> int:
    """`<number>.jsonl` files of about 8 MB with the fields id, language and text; returns the bytes of text."""
    total = number = 0
    file = None
    for document in _documents(pattern):
        size = len(document["text"].encode())
        if file is None or file.tell() > 8_000_000:
            if file is not None:
                file.close()
            file = open(folder / f"{number:04}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
            number += 1
        file.write(json.dumps(document, ensure_ascii=False) + "\n")
        total += size
        if total > megabytes * 1e6:
            break
    assert file is not None
    file.close()
    return total


def _documents(pattern: str | None) -> Iterator[dict[str, str]]:
    turn = 0
    while True:
        if pattern is None:
            corpus = _recipe({"train": {"catalogs": ["django", "wagtail"]}}, None, 1).corpus
            (item,) = list_inputs(corpus.train)
            for row in read_rows(item, corpus.train[0], Tally("catalogs", corpus)):
                # another number each turn, so that no document comes twice
                yield {"id": f"{turn}-{row.id}", "language": row.language, "text": f"{row.text}\n{turn}"}
        else:
            files = sorted(Path("/" if pattern.startswith("/") else ".").glob(pattern.lstrip("/")))
            if not files:
                raise SystemExit(f"--corpus {pattern}: no such file; give a glob of .jsonl or .jsonl.zst files with a field `text`")
            # a document of every file in turn, as in a mixed crawl
            streams = [iter(b"".join(chunks(str(path))).splitlines()) for path in files]
            while streams:
                for stream, path in zip(list(streams), files, strict=False):
                    line = next(stream, None)
                    if line is None:
                        streams.remove(stream)
                        continue
                    text = json.loads(line)["text"]
                    yield {
                        "id": f"{turn}-{path.name}",
                        "language": path.name.split(".")[0],
                        "text": text if not turn else f"{text}\n{turn}",
                    }
        turn += 1


def _recipe(corpus: dict[str, Any], tokenizer: Path | None, workers: int) -> Recipe:
    return parse_recipe(
        {
            "name": "benchmark",
            "corpus": corpus,
            "tokenizer": {"load": str(tokenizer)} if tokenizer else {"sample_bytes": 3_000_000},
            "clusters": {"partitioner": "language"},
            "executor": {"workers": workers, "block_bytes": 4_000_000},
        }
    )


def megatron(kind: str, files: list[Path], tokenizer: Path, prefix: Path, workers: int) -> None:
    """Megatron's way, with one of its encoders."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = token_dtype(Tokenizer.load(tokenizer).vocab_size).type
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with multiprocessing.get_context("spawn").Pool(workers, _start, (kind, str(tokenizer))) as pool:
        for ids in pool.imap(_encode, _lines(files), 32):
            builder.add_document(np.array(ids, dtype), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def _lines(files: list[Path]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as file:
            yield from file


def _start(kind: str, folder: str) -> None:
    global _encoder, _frame
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.load(folder)
    empty = tokenizer.document([])
    _frame = empty[:-1], empty[-1:]
    if kind == "sentencepiece":
        import sentencepiece

        _encoder = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model").encode_as_ids
    else:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(f"{folder}/tokenizer.json")
        backend.encode_special_tokens = True
        _encoder = lambda text: backend.encode(text, add_special_tokens=False).ids  # noqa: E731


def _encode(line: str) -> list[int]:
    front, behind = _frame
    return [*front, *_encoder(json.loads(line)["text"]), *behind]


def ours(recipe: Recipe, run: Path, out: Path) -> None:
    """Tokens and merge, from scratch; the scan is there already."""
    for name in ("tokens", "shards/tokens"):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / "tokens").mkdir()
    build_tokens(recipe, run / "corpus", run / "tokenizer", run / "shards", run / "tokens")
    manifest = load_tokens(run / "tokens")
    shards = [run / "shards" / "tokens" / key for key in manifest["shards"]]
    (out / "assignment").mkdir(parents=True)
    for shard in shards:
        np.save(out / "assignment" / f"{shard.name}.npy", np.zeros(TokenShard(shard).num_documents, np.int32))
    counts = {"all": manifest["languages"]}
    step = MergeStep(shards, out / "assignment", ["all"], counts, manifest["vocab_size"], out / "index", out / "reports")
    run_units(step, recipe.executor, "merge")


def measure(corpus: str | None, tokenizer: Path | None, megabytes: float, workers: int, repeats: int) -> dict[str, Any]:
    """Seconds of ours and of both peers, turn by turn, and in how many documents the ids differ."""
    folder = Path(tempfile.mkdtemp())
    try:
        return _measure(folder, corpus, tokenizer, megabytes, workers, repeats)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, corpus: str | None, tokenizer: Path | None, megabytes: float, workers: int, repeats: int) -> dict[str, Any]:
    (folder / "text").mkdir()
    size = write_corpus(folder / "text", corpus, megabytes)
    files = sorted((folder / "text").iterdir())
    (folder / "valid.jsonl").write_text(
        "".join(json.dumps({"language": code, "text": f"held out {code}"}) + "\n" for code in sorted(_languages(files)))
    )
    run = folder / "run"
    recipe = _recipe({"train": f"{folder}/text/*.jsonl", "valid": str(folder / "valid.jsonl")}, None, workers)
    for name in ("corpus", "tokenizer"):
        (run / name).mkdir(parents=True)
    scan = _seconds(lambda: prepare_corpus(recipe, run / "shards", run / "corpus"))
    if tokenizer is None:
        build_tokenizer(recipe, run / "corpus", run / "tokenizer")
    else:
        shutil.copytree(tokenizer, run / "tokenizer", dirs_exist_ok=True)
    seconds: dict[str, list[float]] = {"ours": [], "megatron, sentencepiece": [], "megatron, tokenizers": []}
    for turn in range(repeats):
        out = folder / f"out-{turn}"
        out.mkdir()
        seconds["ours"].append(_seconds(lambda out=out: ours(recipe, run, out)))
        for kind in ("sentencepiece", "tokenizers"):
            seconds[f"megatron, {kind}"].append(
                _seconds(lambda out=out, kind=kind: megatron(kind, files, run / "tokenizer", out / kind, workers))
            )
        if not turn:
            differ = _compare(files, out)
        shutil.rmtree(out)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "text_mb": size / 1e6,
        "documents": differ["documents"],
        "documents_with_other_ids": {kind: differ[kind] for kind in ("sentencepiece", "tokenizers")},
        "workers": workers,
        "seconds": {name: {"median": medians[name], "p10": _at(values, 10), "p90": _at(values, 90)} for name, values in seconds.items()},
        "mb_per_second": {name: size / 1e6 / value for name, value in medians.items()},
        "scan_seconds": scan,
        "times_faster": {name: value / medians["ours"] for name, value in medians.items() if name != "ours"},
        "times_faster_with_scan": {name: value / (medians["ours"] + scan) for name, value in medians.items() if name != "ours"},
    }


def _languages(files: list[Path]) -> set[str]:
    return {json.loads(line)["language"] for line in _lines(files)}


def _compare(files: list[Path], out: Path) -> dict[str, int]:
    """Documents whose ids differ from ours; raises where more than one in a thousand do."""
    mine = {path.stem: TokenIndex(path.with_suffix("")) for path in (out / "index" / "all").glob("*.idx")}
    peers = {kind: TokenIndex(out / kind) for kind in ("sentencepiece", "tokenizers")}
    places = dict.fromkeys(mine, 0)
    counts = {"documents": 0, "sentencepiece": 0, "tokenizers": 0}
    for number, line in enumerate(_lines(files)):
        language = json.loads(line)["language"]
        ids = mine[language].document(places[language])
        places[language] += 1
        counts["documents"] += 1
        for kind, index in peers.items():
            counts[kind] += not np.array_equal(ids, index.document(number))
    assert all(places[code] == index.num_documents for code, index in mine.items())
    assert max(counts["sentencepiece"], counts["tokenizers"]) <= counts["documents"] / 1000, counts
    return counts


def measure_memory(corpus: str | None, tokenizer: Path | None, sizes: tuple[float, ...]) -> dict[str, float]:
    """Peak resident memory, MB, of one process that does the whole preparation of corpora of several sizes (MB)."""
    found = {}
    for size in sizes:
        command = [sys.executable, __file__, "--peak", "--megabytes", str(size), *(["--corpus", corpus] if corpus else [])]
        done = subprocess.run(
            [*command, *(["--tokenizer", str(tokenizer)] if tokenizer else [])], capture_output=True, text=True, check=True
        )
        found[f"{size:g} MB"] = float(done.stdout.split()[-1])
    return found


def _print_peak(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "text").mkdir()
        write_corpus(folder / "text", options.corpus, options.megabytes)
        files = sorted((folder / "text").iterdir())
        (folder / "valid.jsonl").write_text(
            "".join(json.dumps({"language": code, "text": f"held out {code}"}) + "\n" for code in sorted(_languages(files)))
        )
        settings = {"train": f"{folder}/text/*.jsonl", "valid": str(folder / "valid.jsonl"), "sample_bytes": 200_000}
        recipe = _recipe(settings, None, 1)
        run = folder / "run"
        for name in ("corpus", "tokenizer"):
            (run / name).mkdir(parents=True)
        if options.tokenizer:
            shutil.copytree(options.tokenizer, run / "tokenizer", dirs_exist_ok=True)
        else:
            prepare_corpus(recipe, run / "shards", run / "corpus")
            build_tokenizer(recipe, run / "corpus", run / "tokenizer")
            shutil.rmtree(run / "corpus")
            shutil.rmtree(run / "shards")
            (run / "corpus").mkdir()
        Path("/proc/self/clear_refs").write_text("5")
        prepare_corpus(recipe, run / "shards", run / "corpus")
        ours(recipe, run, folder / "out")
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    finally:
        shutil.rmtree(folder)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _at(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        _print_peak(options)
        return
    found = measure(options.corpus, options.tokenizer, options.megabytes, options.workers, options.repeats)
    print(table(found))
    found["peak_mb"] = measure_memory(options.corpus, options.tokenizer, (options.megabytes / 4, options.megabytes))
    print("peak memory of one process:", ", ".join(f"{value:.0f} MB for {size}" for size, value in found["peak_mb"].items()))
    names = ("torch", "tokenizers", "sentencepiece", "datatrove", "megatron-core")
    print(json.dumps({"benchmark": "tokenising", "python": platform.python_version(), **{name: version(name) for name in names}, **found}))


def table(found: dict[str, Any]) -> str:
    """The measurement as lines of text."""
    lines = [f"{found['documents']:,} documents, {found['text_mb']:.1f} MB, {found['workers']} workers; scan {found['scan_seconds']:.1f} s"]
    for name, values in found["seconds"].items():
        faster = found["times_faster"].get(name)
        told = "" if faster is None else f"   ours is {faster:.2f} times faster, {found['times_faster_with_scan'][name]:.2f} with the scan"
        lines.append(f"{name:<26}{values['median']:8.2f} s {found['mb_per_second'][name]:8.2f} MB/s{told}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
