"""Folders whose contents are hashed when they are finished, so that no damage to them goes unseen.

The last file written is JSON: what the folder says of itself, the hashes of its other files, and the hash of all this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaxelm.errors import StageError
from megaxelm.files import hash_file, hash_value, remove, write_json


def write_sealed(folder: Path, name: str, value: dict[str, Any], files: Sequence[str]) -> None:
    """Write `name` into a folder that is otherwise finished; `files` are those to hash."""
    sealed = value | {"files": {file: hash_file(folder / file) for file in files}}
    write_json(folder / name, sealed | {"seal": hash_value(sealed)})


def read_sealed(folder: Path, name: str) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        StageError: a file is missing or has changed; whoever asks knows the way out.
    """
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(value, dict) or value.pop("seal", None) != hash_value(value):
            raise ValueError
        for file, expected in value["files"].items():
            if hash_file(folder / file) != expected:
                raise StageError(f"{file} has changed")
    except OSError as error:
        raise StageError(f"{Path(error.filename or name).name}: {str(error.strerror).lower()}") from None
    except (ValueError, RecursionError):
        raise StageError(f"{name} has changed") from None
    return value


@contextmanager
def finished_folder(target: Path, is_done: Callable[[], bool]) -> Iterator[Path]:
    """A folder of this process's own, which becomes `target` when the block ends well, unless another process was there first.

    What lies at `target` without being done, because it was damaged, gives way.
    """
    aside = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")
    remove(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        if not is_done():
            remove(target)
            try:
                os.rename(aside, target)
            except OSError:
                if not is_done():  # otherwise another process was there between the two
                    raise
    finally:
        remove(aside)
