"""Small things on disk: JSON written atomically, hashes, folders replaced by rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash

from megaxelm.errors import StageError


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StageError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; the stage that makes it has not run (megaxelm run RECIPE makes what is missing)") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StageError(f"{path}: damaged JSON ({error}); remove the folder it lies in and run again") from None


def hash_value(value: Any) -> str:
    """Hash of a JSON value, the same on every machine."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())


def hash_file(path: Path) -> str:
    """xxh3 of a file's content, read in pieces."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def replace_folder(made: Path, target: Path) -> None:
    """Put `made` where `target` is. Between the two renames `target` is missing, never half there."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        os.rename(target, old)
    os.rename(made, target)
    if old.exists():
        shutil.rmtree(old)
