"""Files of a corpus source: which they are, their names without the machine's path, their bytes decompressed, their fingerprint."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash
import zstandard

from megaxelm.errors import CorpusError
from megaxelm.recipe import FileSource

_EDGE_BYTES = 64 * 1024


def expand_files(source: FileSource) -> list[Path]:
    """The files of a source, each once, sorted by name.

    Raises:
        CorpusError: a path that does not exist or a glob that matches nothing.
    """
    found: set[str] = set()
    for pattern in source.files:
        expanded = os.path.expanduser(pattern)
        if os.path.isfile(expanded):
            found.add(expanded)
            continue
        matches = [path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]
        if not matches:
            if os.path.isdir(expanded):
                reason = f"is a folder: name its files, e.g. {pattern.rstrip('/')}/**/*.jsonl"
            elif glob.has_magic(expanded):
                reason = f"matches no file; relative globs start from the current folder, {os.getcwd()}"
            else:
                reason = f"does not exist; relative paths start from the current folder, {os.getcwd()}"
            raise CorpusError(f"corpus source `{pattern}` {reason}")
        found.update(matches)
    return [Path(path) for path in sorted(found)]


def lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file, without their newline; errors as `chunks`."""
    # a list, because adding to bytes would take quadratic time on a file that is one huge line
    rest: list[bytes] = []
    for chunk in chunks(path):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if any(rest):
        yield b"".join(rest)


def chunks(path: Path) -> Iterator[bytes]:
    """Bytes of a file, decompressed by its ending.

    Raises:
        CorpusError: if the file cannot be read, is not what its ending says, or was cut.
    """
    try:
        if path.name.lower().endswith(".gz"):
            yield from _gzip_chunks(path)
        elif path.name.lower().endswith(".zst"):
            yield from _zstandard_chunks(path)
        else:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk
    except EOFError:
        raise CorpusError(f"{path}: the compressed file was cut: its end is missing. Fetch or write it again, or leave it out") from None
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); mend it or leave it out of the corpus") from None


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names relative to the common folder of all files, with forward slashes."""
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute]) if absolute else ""
    return [Path(os.path.relpath(path, common)).as_posix() for path in absolute]


def file_value(path: Path) -> str:
    """`size:hash` of a file, the hash over its size and its first and last 64 kB."""
    size = path.stat().st_size
    digest = xxhash.xxh3_64(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES), io.SEEK_SET)
        digest.update(file.read(_EDGE_BYTES))
    return f"{size}:{digest.hexdigest()}"


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    if not path.stat().st_size:
        raise EOFError
    with gzip.open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _zstandard_chunks(path: Path) -> Iterator[bytes]:
    # zstandard's stream reader takes a cut file for a complete one; a decompressor object tells whether its frame has ended
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    with open(path, "rb") as file:
        while data := file.read(128 * 1024):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
        if frame is not None or not file.tell():
            raise EOFError
