"""The run directory: where things lie, which stage is made from what, what is stale and why.

A stage's marker `stage.json` is written last, inside its folder, and holds what the stage was made from: the recipe settings it
depends on, the fingerprints of the stages before it, and those of source files. The same three, computed from the recipe at
hand, say whether it is fresh. See docs/architecture.md, Flow.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaxelm.errors import StageError
from megaxelm.files import hash_value, is_model_folder, read_json, remove, replace_folder, write_json
from megaxelm.recipe import Recipe, dump_recipe, load_recipe

MARKER = "stage.json"
MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class MadeFrom:
    """What a stage depends on. Equal values mean that making it again would give the same."""

    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return hash_value([self.settings, self.inputs, self.sources])

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "inputs": self.inputs, "sources": self.sources, "fingerprint": self.fingerprint}

    def changes_since(self, old: dict[str, Any]) -> list[str]:
        """In words, what differs from the marker of an earlier run; empty when nothing does."""
        changes = [
            f"{key} {_short(before)} -> {_short(now)}"
            for key, before, now in _differences(_flatten(old.get("settings", {})), _flatten(self.settings))
        ]
        changes += [f"{name} was made again" for name, _, _ in _differences(old.get("inputs", {}), self.inputs)]
        sources = [name for name, _, _ in _differences(old.get("sources", {}), self.sources)]
        if sources:
            more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
            changes.append(f"source changed: {', '.join(sources[:3])}{more}")
        return changes


class RunFolder:
    """Paths and markers of one run directory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.name

    def expert(self, name: str) -> Path:
        return self.path / "experts" / name

    def folder(self, unit: str) -> Path:
        """Folder of a unit: a stage's name, or `experts/<name>`."""
        return self.path / unit

    def marker(self, unit: str) -> dict[str, Any] | None:
        """The marker of a finished unit, or None."""
        path = self.folder(unit) / MARKER
        if not path.exists():
            return None
        fields = {"settings": dict, "inputs": dict, "sources": dict, "fingerprint": str}
        if not unit.startswith("experts/"):
            return read_json(path, **fields)
        if not is_model_folder(self.folder(unit) / "export"):
            return None  # what it stands for has been removed
        return read_json(path, **fields, weights=str)

    def recipe(self) -> Recipe:
        """The resolved recipe stored with the run.

        Raises:
            StageError: the folder is not a run directory.
        """
        path = self.path / "recipe.yaml"
        if not path.exists():
            raise StageError(f"{self.path}: not a run directory (no recipe.yaml in it); give a folder that `megaxelm run` made")
        return load_recipe(path)

    def write_recipe(self, recipe: Recipe) -> None:
        path = self.path / "recipe.yaml"
        aside = path.with_name(f".recipe.yaml.{os.uname().nodename}.{os.getpid()}")
        aside.write_text(dump_recipe(recipe), encoding="utf-8")
        os.replace(aside, path)

    def status(self, unit: str, made_from: MadeFrom) -> str | None:
        """None when the unit is fresh, otherwise why it has to be made."""
        marker = self.marker(unit)
        if marker is None:
            return "unfinished" if self.folder(unit).exists() else "missing"
        if marker.get("fingerprint") == made_from.fingerprint:
            return None
        return "stale: " + "; ".join(made_from.changes_since(marker) or ["its marker is from another version"])

    @contextlib.contextmanager
    def making(self, unit: str, made_from: MadeFrom) -> Iterator[Path]:
        """A temporary folder that becomes the unit's when the block ends well, marker last. A failed block leaves what was there before."""
        target = self.folder(unit)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.making")
        remove(aside)
        aside.mkdir()
        try:
            yield aside
            write_json(aside / MARKER, made_from.to_json())
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        replace_folder(aside, target)

    def open_expert(self, name: str, made_from: MadeFrom) -> str | None:
        """Make the folder of an expert ready for training from `made_from`; what was trained from something else moves to `replaced/`.

        Returns:
            Where the earlier folder went, relative to the run, or None.
        """
        folder = self.expert(name)
        moved = None
        note = folder / MADE_FROM
        if self.marker(f"experts/{name}") is None:
            (folder / MARKER).unlink(missing_ok=True)
        if folder.exists() and (not note.exists() or read_json(note).get("fingerprint") != made_from.fingerprint):
            moved = self._set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            write_json(note, made_from.to_json())
        return moved

    def _set_aside(self, folder: Path) -> str:
        replaced = self.path / "replaced"
        replaced.mkdir(exist_ok=True)
        number = 1
        while (replaced / f"{folder.name}-{number}").exists():
            number += 1
        os.rename(folder, replaced / f"{folder.name}-{number}")
        return f"replaced/{folder.name}-{number}"

    def set_expert_aside(self, name: str) -> str | None:
        """Move an expert's folder to `replaced/`, so that it is trained from its start again."""
        folder = self.expert(name)
        return self._set_aside(folder) if folder.exists() else None

    def close_expert(self, name: str, made_from: MadeFrom, weights: str) -> None:
        """Write the marker of a finished expert, with the hash of its weights: what branches from it depends on them."""
        write_json(self.expert(name) / MARKER, made_from.to_json() | {"weights": weights})

    def lock_file(self, unit: str) -> Path:
        """The file that is locked while a unit is made. Not inside the unit's folder, which may be moved away meanwhile."""
        return self.path / ".locks" / unit.replace("/", "-").replace(".", "run")

    @contextlib.contextmanager
    def lock(self, unit: str = ".") -> Iterator[None]:
        """One maker at a time of the run, or of one unit of it.

        Raises:
            StageError: another process works on it; its process id is named.
        """
        folder, path = self.folder(unit), self.lock_file(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise StageError(f"{folder}: another megaxelm works here ({owner}); wait for it or stop it") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)  # who is still named here ended without coming to this line


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = list(old) + [key for key in new if key not in old]
    return [(key, old.get(key), new.get(key)) for key in keys if key not in old or key not in new or old[key] != new[key]]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
