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
        file.write(json_text(value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_if_changed(path: Path, value: Any) -> None:
    """Write JSON where the file is missing or holds another value."""
    if not path.exists() or path.read_text(encoding="utf-8") != json_text(value):
        write_json(path, value)


def json_text(value: Any) -> str:
    """How `write_json` writes a value."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def read_json(path: Path, **fields: type) -> dict[str, Any]:
    """Read a JSON object that the program wrote; `fields` must be in it, of the types given.

    Raises:
        StageError: the file is missing or damaged.
    """
    way_out = "make the stage that wrote it again: megaxelm run RECIPE --from STAGE"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; {way_out}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path}: damaged ({error}); {way_out}") from None
    if not isinstance(value, dict):
        raise StageError(f"{path}: damaged (a {type(value).__name__} where an object was written); {way_out}")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise StageError(f"{path}: damaged (no proper `{name}` in it); {way_out}")
    return value


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


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds an exported model: a Hugging Face checkpoint, or an adapter beside its base."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def replace_folder(made: Path, target: Path) -> None:
    """Put `made` where `target` is. Between the two renames `target` is missing, never half there."""
    old = target.with_name(f".{target.name}.old")
    remove(old)
    if target.exists():
        os.rename(target, old)
    os.rename(made, target)
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder, or a file that lies in its place; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
