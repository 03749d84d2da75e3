"""Token index: opening a very large one, and random training samples; against megatron-core and plain numpy.

    python benchmarks/token_index.py [--quick] [--documents 100000000] [--megatron-documents 10000000] [--folder /tmp]

Opening: from files to the first training sample of 2049 tokens. megatron-core (GPTDataset, cache included) builds and writes three arrays
before it; it gets an index of its own size, since at the full one it takes minutes. The `.bin` is a hole in the file system, 20 bytes a
document are really written. Samples: batches of 64 from an index of 10^8 tokens in memory, as one int64 tensor. `numpy` slices a
np.memmap and copies each slice to a tensor, `numpy, rows` fills the rows of one array; ours also finds the order and the beginnings of
documents. Outputs are compared first, then all take turns. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter, index_paths, write_idx

LENGTH = 2048
BATCH = 64
VOCABULARY = 60_000
_CHUNK = 1 << 20


def document_lengths(documents: int, mean: int) -> Iterator[np.ndarray]:
    """Lengths in parts, the same on every call."""
    draw = np.random.default_rng(0)
    for first in range(0, documents, _CHUNK):
        yield draw.integers(2, 2 * mean - 1, min(_CHUNK, documents - first), dtype=np.int32)


def write_hollow(prefix: Path, documents: int, mean: int = 300) -> int:
    """An index of which only the `.idx` is written; its tokens are a hole. Returns how many there are."""
    tokens = sum(int(part.sum()) for part in document_lengths(documents, mean))
    index = (np.arange(first, min(first + _CHUNK, documents + 1)) for first in range(0, documents + 1, _CHUNK))
    write_idx(index_paths(prefix)[1], np.dtype("<u2"), documents, documents + 1, lambda: document_lengths(documents, mean), index)
    with open(index_paths(prefix)[0], "wb") as file:
        file.truncate(2 * tokens)
    return tokens


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_ours(prefix: Path) -> np.ndarray:
    blend = Blend({"xx": [TokenIndex(prefix)]}, LENGTH, 1.0, 0)
    return blend.read(123, 1).tokens[0]


def megatron_dataset(prefix: Path, cache: Path) -> Any:
    """megatron-core's training data over a whole index, one epoch; builds its cache where there is none."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(vocab_size=VOCABULARY, eod=0, pad=1, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        path_to_cache=str(cache),
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    index = IndexedDataset(str(prefix), mmap=True)
    documents = np.arange(len(index.document_indices) - 1, dtype=np.int32)
    return GPTDataset(index, str(prefix), documents, None, Split.train, config)


def measure_opening(folder: Path, documents: int, megatron_documents: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first training sample: files in memory, and files dropped from the page cache."""
    prefix = folder / "large"
    tokens = write_hollow(prefix, documents)
    assert not open_ours(prefix).any(), "a hole reads as zeros"
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        for state in times:
            if state == "cold":
                gc.collect()
                forget(index_paths(prefix)[1])
            began = time.perf_counter()
            open_ours(prefix)
            times[state].append(time.perf_counter() - began)
    result: dict[str, Any] = {"documents": documents, "tokens": tokens, "idx_bytes": index_paths(prefix)[1].stat().st_size}
    result |= {f"{state}_s": float(np.median(values)) for state, values in times.items()}
    result |= {"worst_s": max(max(values) for values in times.values())}
    for path in index_paths(prefix):
        path.unlink()
    print(f"opening {documents:,} documents ({tokens:,} tokens) and reading a first sample")
    print(f"  ours             {result['warm_s'] * 1e3:10.1f} ms   ({result['cold_s'] * 1e3:.1f} ms from the disk)")
    if megatron_documents:
        result["megatron"] = measure_megatron_opening(folder, megatron_documents)
        seconds = result["megatron"]
        print(
            f"  megatron-core    {seconds['build_s'] * 1e3:10.1f} ms   with {megatron_documents:,} documents, building its cache of "
            f"{seconds['cache_bytes'] / 1e6:,.0f} MB; {seconds['cached_s'] * 1e3:.1f} ms with the cache"
        )
    return result


def measure_megatron_opening(folder: Path, documents: int) -> dict[str, Any]:
    prefix, cache = folder / "theirs", folder / "cache"
    write_hollow(prefix, documents)
    result: dict[str, Any] = {"documents": documents}
    megatron_dataset(_small(folder), folder / "warm")[0]  # imports and first use are not what is measured
    for name in ("build_s", "cached_s"):
        began = time.perf_counter()
        sample = megatron_dataset(prefix, cache)[0]["tokens"]
        result[name] = time.perf_counter() - began
        assert len(sample) == LENGTH
    result["cache_bytes"] = sum(path.stat().st_size for path in cache.iterdir())
    for path in index_paths(prefix):
        path.unlink()
    return result


def _small(folder: Path) -> Path:
    write_hollow(folder / "small", 1000)
    return folder / "small"


def write_full(prefix: Path, tokens: int, mean: int) -> None:
    """An index of random tokens in documents of 2 to 2 mean tokens."""
    draw = np.random.default_rng(1)
    with TokenIndexWriter(prefix, VOCABULARY) as writer:
        for part in document_lengths(tokens // mean, mean):
            writer.add_many(draw.integers(0, VOCABULARY, int(part.sum()), dtype=np.uint16), part)


def measure_samples(folder: Path, tokens: int, batches: int, with_megatron: bool, mean: int = 300) -> dict[str, Any]:
    """Microseconds a sample of 2049 tokens, in batches of 64."""
    prefix = folder / "samples"
    write_full(prefix, tokens, mean)
    index = TokenIndex(prefix)
    index.verify(VOCABULARY)
    blend = Blend({"xx": [index]}, LENGTH, 1.0, 0)
    memmap = np.memmap(index_paths(prefix)[0], np.uint16, mode="r")
    ends = np.cumsum(index.document_lengths(0, index.num_documents))

    def ours(batch: int, places: list[int]) -> torch.Tensor:
        return torch.from_numpy(blend.read(BATCH * batch, BATCH).tokens)

    def numpy_slices(batch: int, places: list[int]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(memmap[place : place + LENGTH + 1].astype(np.int64)) for place in places])

    def numpy_rows(batch: int, places: list[int]) -> torch.Tensor:
        out = np.empty((BATCH, LENGTH + 1), np.int64)
        for row, place in enumerate(places):
            out[row] = memmap[place : place + LENGTH + 1]
        return torch.from_numpy(out)

    readers: dict[str, Callable[[int, list[int]], torch.Tensor]] = {"ours": ours, "numpy": numpy_slices, "numpy, rows": numpy_rows}
    if with_megatron:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        theirs = IndexedDataset(str(prefix), mmap=True)

        def megatron(batch: int, places: list[int]) -> torch.Tensor:
            rows = []
            for place in places:
                document, parts, need = int(np.searchsorted(ends, place, side="right")), [], LENGTH + 1
                offset = place - (int(ends[document - 1]) if document else 0)
                while need:
                    part = theirs.get(document, offset=offset, length=None if offset + need > theirs.sequence_lengths[document] else need)
                    parts.append(part)
                    document, offset, need = document + 1, 0, need - len(part)
                rows.append(np.concatenate(parts, dtype=np.int64))
            return torch.from_numpy(np.stack(rows))

        readers["megatron-core get"] = megatron

    # Another object tells where the samples lie, so that nothing that is measured has been worked out before.
    guide = Blend({"xx": [index]}, LENGTH, 1.0, 0)
    chosen = []
    for first in range(0, BATCH * (batches + 5), BATCH):
        block = guide._block(first // 1024)
        inside = block.places[first % 1024 : first % 1024 + BATCH].tolist()
        # the one window that runs round the circle cannot be sliced
        chosen.append([min(place, index.num_tokens - LENGTH - 1) for place in inside])
    for batch in range(5):
        wanted = numpy_slices(batch, chosen[batch])
        for name, read in readers.items():
            assert torch.equal(read(batch, chosen[batch]), wanted), name
    turns = np.random.default_rng(2)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for batch in range(5, batches + 5):
        # In another order each time: what comes behind a slow one finds the caches of the processor full of its data.
        for turn in turns.permutation(len(readers)).tolist():
            name, read = list(readers.items())[turn]
            began = time.perf_counter()
            read(batch, chosen[batch])
            times[name].append((time.perf_counter() - began) * 1e6 / BATCH)
    result: dict[str, Any] = {"tokens": index.num_tokens, "documents": index.num_documents, "batches": batches}
    print(f"samples of {LENGTH + 1} tokens in batches of {BATCH}, from {index.num_tokens:,} tokens in {index.num_documents:,} documents")
    for name, values in times.items():
        low, median, high = np.percentile(values, [10, 50, 90]).tolist()
        result[name] = {"us": median, "p10": low, "p90": high, "mean": float(np.mean(values))}
        ratio = float(np.median(np.array(times["ours"]) / np.array(values)))
        result[name]["ours_to_this"] = ratio
        print(f"  {name:<18} {median:8.2f} us a sample   (p10 {low:.2f}, p90 {high:.2f})   ours takes {ratio:.2f} x its time")
    return result


def measure(
    quick: bool = False, documents: int | None = None, megatron_documents: int | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Both measurements. `megatron_documents` = 0 leaves megatron-core out."""
    warnings.filterwarnings("ignore", module="megatron")
    documents = documents or (1_000_000 if quick else 100_000_000)
    theirs = megatron_documents if megatron_documents is not None else (100_000 if quick else 10_000_000)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        opening = measure_opening(Path(scratch), documents, theirs, 3 if quick else 7)
        samples = measure_samples(Path(scratch), 10_000_000 if quick else 100_000_000, 50 if quick else 400, bool(theirs))
    return {"benchmark": "token_index", "opening": opening, "samples": samples, "torch": torch.__version__, "numpy": np.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--documents", type=int, help="documents of the index that is opened")
    parser.add_argument("--megatron-documents", type=int, help="documents of the one that megatron-core opens; 0: without it")
    parser.add_argument("--folder", type=Path, help="where the files go, 3 GB at most; removed at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(options.quick, options.documents, options.megatron_documents, options.folder)))


if __name__ == "__main__":
    main()
