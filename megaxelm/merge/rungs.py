"""Merged models in a run: `merged/<rung>/`, a Hugging Face checkpoint with `merge.json`, which says what it was made from.

A rung is written aside and then renamed. It is fresh where what it would be made from now is what `merge.json` says; its name may be
given, so that several of a kind lie side by side.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaxelm.errors import MergeError
from megaxelm.files import read_json, remove, replace_folder, write_json
from megaxelm.model.config import active_parameters, num_parameters
from megaxelm.model.export import write_export
from megaxelm.model.hub import load_config, weights_hash
from megaxelm.model.source import WeightSource
from megaxelm.run import RunFolder

MERGED = "merged"
RECORD = "merge.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = ("mixture", "seed", "dense", "all")


def rung_folder(run: RunFolder, name: str) -> Path:
    """Where the rung `name` lies.

    Raises:
        MergeError: a name that cannot be one of a folder, or that the ladder has for something else.
    """
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise MergeError(f"--name {name}: letters, digits, `.`, `_` and `-`, a letter or digit first, and not {', '.join(_TAKEN)}")
    return run.path / MERGED / name


def read_rung(run: RunFolder, name: str) -> dict[str, Any] | None:
    """The record of a rung that is there, or None."""
    folder = rung_folder(run, name)
    if not (folder / RECORD).is_file() or not (folder / "config.json").is_file():
        return None
    return read_json(folder / RECORD, rung=str, kind=str, made_from=dict, facts=dict)


def rung_names(run: RunFolder) -> list[str]:
    """Names of the rungs that are there, sorted."""
    folder = run.path / MERGED
    found = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}")) if folder.is_dir() else []
    return [name for name in found if not name.startswith(".")]


def is_fresh(run: RunFolder, name: str, made_from: dict[str, Any]) -> bool:
    """Whether the rung is there and made from this."""
    record = read_rung(run, name)
    return record is not None and record["made_from"] == made_from


def write_rung(
    run: RunFolder,
    name: str,
    kind: str,
    made_from: dict[str, Any],
    facts: dict[str, Any],
    source: WeightSource,
    dtype: str,
    texts_tokens: Sequence[Sequence[int]],
) -> Path:
    """Write the checkpoint of `source`, reload it, compare logits on `texts_tokens` with transformers' own class, and put it in its place.

    Raises:
        ModelError: as `write_export`.
    """
    folder = rung_folder(run, name)
    aside = folder.with_name(f".{name}.new")
    folder.parent.mkdir(exist_ok=True)
    write_export(source, aside, dtype, run.folder("tokenizer"), texts_tokens)
    return close_rung(run, name, kind, made_from, facts, aside)


def close_rung(run: RunFolder, name: str, kind: str, made_from: dict[str, Any], facts: dict[str, Any], made: Path) -> Path:
    """Put the checkpoint folder `made` in its place, with its record."""
    folder, config = rung_folder(run, name), load_config(made)
    record = {
        "rung": name,
        "kind": kind,
        "made_from": made_from,
        "facts": facts,
        "parameters": num_parameters(config),
        "active_parameters": active_parameters(config),
        "weights": weights_hash(made),
    }
    write_json(made / RECORD, record)
    replace_folder(made, folder)
    return folder


def remove_leftovers(run: RunFolder, name: str) -> None:
    """Remove what an interrupted writing has left; a training that was stopped is kept."""
    folder = rung_folder(run, name)
    for leftover in (folder.with_name(f".{name}.new"), folder.with_name(f"..{name}.new.making")):
        if leftover.exists():
            remove(leftover)


def training_folder(run: RunFolder, name: str) -> Path:
    """Where a rung is trained: a small run of its own that may be stopped and goes on."""
    return rung_folder(run, name).parent / ".training" / name


def drop_training(run: RunFolder, name: str) -> None:
    """Remove a rung's training."""
    shutil.rmtree(training_folder(run, name), ignore_errors=True)
