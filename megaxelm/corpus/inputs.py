"""Inputs: the parts of a corpus that are read from front to back, one at a time; their names, fingerprints and bytes.

An input is a file, a group of text files, a shard of a Hugging Face dataset, or a set of message catalogs. What the inputs are
follows from the sources alone, and their order is that of the sources, then of the sorted file names: nothing here depends on how many
processes read them. Files may lie wherever fsspec reaches (`s3://`, `hf://`, `https://`).
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import xxhash
import zstandard

from megaxelm.corpus.catalogs import catalog_fingerprint
from megaxelm.errors import CorpusError
from megaxelm.recipe import CatalogSource, FileSource, HuggingFaceSource

AnySource = FileSource | HuggingFaceSource | CatalogSource
TEXT_FILES = 1000
"""Text files of one input at most: each is one document."""
_EDGE_BYTES = 64 * 1024
_PIECE = 1 << 20
_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Input:
    """A part of a source that one worker reads from front to back."""

    source: int
    """Number of the source in its list."""
    kind: str
    """jsonl, parquet, text, huggingface or catalogs."""
    name: str
    """For messages and manifests: without the machine's path."""
    value: str
    """Cheap fingerprint of the content: `size:hash`, or a hash alone."""
    files: tuple[str, ...] = ()
    """Addresses of the files."""
    part: int = 0
    """Number of the shard of a Hugging Face dataset."""


def list_inputs(sources: Sequence[AnySource]) -> list[Input]:
    """The inputs of all sources, in order.

    Raises:
        CorpusError: a file or dataset that is not there, a glob that matches nothing, an ending that is not known.
    """
    groups = [_files_of(source) if isinstance(source, FileSource) else [] for source in sources]
    names = iter(short_names([address for group in groups for address in group]))
    inputs: list[Input] = []
    for number, (source, group) in enumerate(zip(sources, groups, strict=True)):
        if isinstance(source, HuggingFaceSource):
            inputs += _dataset_inputs(number, source)
        elif isinstance(source, CatalogSource):
            value = xxhash.xxh3_64_hexdigest(repr(sorted(catalog_fingerprint(source).items())).encode())
            inputs.append(Input(number, "catalogs", "message catalogs of " + ", ".join(source.catalogs), value))
        else:
            inputs += _file_inputs(number, source, group, [next(names) for _ in group])
    return inputs


def source_fingerprint(sources: Sequence[AnySource]) -> dict[str, str]:
    """A cheap value for each input, to find out whether a run is stale: {name: value}.

    The value of a file covers its size, first and last 64 kB; that of a remote one what its store says of it (size, ETag, time). Names are
    relative to the common folder of all files: a moved corpus stays the same.

    Raises:
        CorpusError: as `list_inputs`.
    """
    found: dict[str, str] = {}
    for item in list_inputs(sources):
        found[item.name if item.name not in found else f"{item.name} (source {item.source})"] = item.value
    return found


@contextmanager
def open_bytes(address: str) -> Iterator[IO[bytes]]:
    """The file at a path or address, as it is stored.

    Raises:
        CorpusError: it cannot be opened, or its store fails while it is read.
    """
    if not is_remote(address):
        with open(address, "rb") as file:
            yield file
        return
    filesystem, path = _filesystem(address)
    try:
        with filesystem.open(path, "rb") as file:
            yield file
    except (CorpusError, EOFError, GeneratorExit):
        raise
    except Exception as error:
        raise CorpusError(f"{address}: cannot be read ({reason(error)}); check the address, the credentials and the network") from error


def chunks(address: str, offset: int = 0) -> Iterator[bytes]:
    """Bytes of a file from `offset` on, decompressed by its ending; `offset` counts decompressed bytes.

    Raises:
        CorpusError: if the file cannot be read, is not what its ending says, or was cut.
    """
    ending = address.lower().rsplit(".", 1)[-1]
    try:
        with open_bytes(address) as file:
            if ending == "gz":
                yield from _without_front(_gzip_chunks(file), offset)
            elif ending == "zst":
                yield from _without_front(_zstandard_chunks(file), offset)
            else:
                file.seek(offset)
                while chunk := file.read(_PIECE):
                    yield chunk
    except EOFError:
        raise CorpusError(f"{address}: the compressed file was cut: its end is missing. Fetch or write it again, or leave it out") from None
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(f"{address}: cannot be read ({error}); mend it or leave it out of the corpus") from None


def lines(address: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a plain or compressed file from a line that begins at `offset`, lines without their newline; errors as `chunks`."""
    # a list, because adding to bytes would take quadratic time on a file that is one huge line
    rest: list[bytes] = []
    for chunk in chunks(address, offset):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for following in others:
            line = b"".join(rest)
            yield offset, line
            offset += len(line) + 1
            rest = [following]
    if any(rest):
        yield offset, b"".join(rest)


def short_names(addresses: Sequence[str]) -> list[str]:
    """Names relative to the common folder of all local files, with forward slashes; remote files keep their address."""
    local = [os.path.abspath(address) for address in addresses if not is_remote(address)]
    common = os.path.commonpath([os.path.dirname(path) for path in local]) if local else ""
    names = iter(Path(os.path.relpath(path, common)).as_posix() for path in local)
    return [address if is_remote(address) else next(names) for address in addresses]


def is_remote(address: str) -> bool:
    """Whether fsspec is needed to reach the file."""
    return "://" in address


def folder_name(address: str) -> str:
    """Name of the folder that a file lies in."""
    return PurePosixPath(address).parent.name if is_remote(address) else Path(address).resolve().parent.name


def dataset_name(source: HuggingFaceSource) -> str:
    """Name of a dataset without the machine's path."""
    return Path(source.huggingface).resolve().name if os.path.isdir(source.huggingface) else source.huggingface


def open_dataset(source: HuggingFaceSource) -> Any:
    """The dataset as a stream of rows.

    Raises:
        CorpusError: it cannot be opened.
    """
    import datasets

    try:
        return datasets.load_dataset(source.huggingface, source.config, data_files=source.data_files, split=source.split, streaming=True)
    except Exception as error:
        raise CorpusError(f"Hugging Face dataset {source.huggingface}, split {source.split}: {reason(error)}; {DATASET_ADVICE}") from error


DATASET_ADVICE = "check `huggingface:`, `config:`, `split:` and `data_files:` of this corpus source, and the network"


def reason(error: BaseException) -> str:
    """First line of what an exception says."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _files_of(source: FileSource) -> list[str]:
    """The files of a source, each once, sorted by name."""
    found: set[str] = set()
    for pattern in source.files:
        found.update(_match_remote(pattern) if is_remote(pattern) else _match_local(pattern))
    return sorted(found)


def _match_local(pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isfile(expanded):
        return [expanded]
    matches = [path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]
    if not matches:
        if os.path.isdir(expanded):
            why = f"is a folder: name its files, e.g. {pattern.rstrip('/')}/**/*.jsonl"
        elif glob.has_magic(expanded):
            why = f"matches no file; relative globs start from the current folder, {os.getcwd()}"
        else:
            why = f"does not exist; relative paths start from the current folder, {os.getcwd()}"
        raise CorpusError(f"corpus source `{pattern}` {why}")
    return matches


def _match_remote(pattern: str) -> list[str]:
    filesystem, path = _filesystem(pattern)
    try:
        # A store without listings (https) is asked for one file; one with them also says what a glob matches.
        matches = filesystem.glob(path) if glob.has_magic(path) else [path] if filesystem.isfile(path) else []
    except Exception as error:
        raise CorpusError(f"corpus source `{pattern}`: {reason(error)}; check the address, the credentials and the network") from error
    if not matches:
        raise CorpusError(f"corpus source `{pattern}` matches no file; check the address and the credentials")
    return [filesystem.unstrip_protocol(match) for match in matches]


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise CorpusError(
            f"{address}: cannot be reached ({reason(error)}); s3:// needs the extra `scale`, other stores their fsspec package"
        ) from None
    return filesystem, path


def _file_inputs(number: int, source: FileSource, addresses: Sequence[str], names: Sequence[str]) -> list[Input]:
    inputs: list[Input] = []
    texts: list[tuple[str, str]] = []
    for address, name in zip(addresses, names, strict=True):
        kind = _format_of(address, source)
        if kind == "text":
            texts.append((address, name))
        else:
            inputs.append(Input(number, kind, name, _file_value(address), (address,)))
    for start in range(0, len(texts), TEXT_FILES):
        group = texts[start : start + TEXT_FILES]
        # the folder's name is the language, which a name relative to that folder does not show
        values = "\n".join(f"{folder_name(address)}/{name}={_file_value(address)}" for address, name in group)
        label = group[0][1] if len(group) == 1 else f"{group[0][1]} to {group[-1][1]}, {len(group)} text files"
        inputs.append(Input(number, "text", label, xxhash.xxh3_64_hexdigest(values.encode()), tuple(address for address, _ in group)))
    return inputs


def _format_of(address: str, source: FileSource) -> str:
    if source.format != "auto":
        return source.format
    name = PurePosixPath(address).name.lower()
    bare = name.removesuffix(".gz").removesuffix(".zst")
    kind = next((kind for ending, kind in _FORMATS.items() if bare.endswith(ending)), None)
    if kind is None or (kind == "parquet" and bare != name):
        raise CorpusError(
            f"{address}: unknown ending; corpus source format `auto` knows .jsonl and .json (also .gz, .zst), .parquet and .txt. "
            "Set `format:` of this source to jsonl, parquet or text, or narrow the glob"
        )
    return kind


def _file_value(address: str) -> str:
    """`size:hash` of a file, the hash over its size and its first and last 64 kB; of a remote one, over what its store says."""
    if is_remote(address):
        filesystem, path = _filesystem(address)
        try:
            return f"{filesystem.info(path).get('size')}:{xxhash.xxh3_64_hexdigest(str(filesystem.ukey(path)).encode())}"
        except Exception as error:
            raise CorpusError(f"{address}: {reason(error)}; check the address, the credentials and the network") from error
    size = os.path.getsize(address)
    digest = xxhash.xxh3_64(str(size).encode())
    with open(address, "rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES), io.SEEK_SET)
        digest.update(file.read(_EDGE_BYTES))
    return f"{size}:{digest.hexdigest()}"


def _dataset_inputs(number: int, source: HuggingFaceSource) -> list[Input]:
    name = f"{dataset_name(source)}:{source.config or 'default'}:{source.split}"
    value = "hub"
    if os.path.isdir(source.huggingface):
        folder = Path(source.huggingface)
        digest, size = xxhash.xxh3_64(), 0
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder).as_posix()}={_file_value(str(path))}".encode())
            size += path.stat().st_size
        value = f"{size}:{digest.hexdigest()}"
    parts = max(1, int(open_dataset(source).num_shards))
    return [
        Input(number, "huggingface", name if parts == 1 else f"{name}, shard {part + 1} of {parts}", value, part=part)
        for part in range(parts)
    ]


def _without_front(pieces: Iterator[bytes], offset: int) -> Iterator[bytes]:
    for piece in pieces:
        if offset >= len(piece):
            offset -= len(piece)
            continue
        yield piece[offset:] if offset else piece
        offset = 0


def _gzip_chunks(file: IO[bytes]) -> Iterator[bytes]:
    if not file.read(1):
        raise EOFError
    file.seek(0)
    with gzip.open(file, "rb") as stream:
        while chunk := stream.read(_PIECE):
            yield chunk


def _zstandard_chunks(file: IO[bytes]) -> Iterator[bytes]:
    # zstandard's stream reader takes a cut file for a complete one; a decompressor object tells whether its frame has ended
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    empty = True
    while data := file.read(128 * 1024):
        empty = False
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None or empty:
        raise EOFError
