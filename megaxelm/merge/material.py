"""What is merged: the experts of a run's ensemble, which must be one architecture and branch from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import xxhash

from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.errors import MergeError
from megaxelm.files import hash_file, read_json
from megaxelm.model.config import DecoderConfig
from megaxelm.model.source import WeightSource
from megaxelm.run import RunFolder


@dataclass(frozen=True)
class Material:
    """The trained experts of an ensemble, in its order; their tensors are read one at a time."""

    run: RunFolder
    ensemble: Ensemble

    @property
    def names(self) -> list[str]:
        """Names of the experts, without a fallback."""
        return self.ensemble.trained

    @cached_property
    def sources(self) -> list[WeightSource]:
        """The experts' weights."""
        assert self.ensemble.sources is not None  # an ensemble of a folder has them
        return [self.ensemble.sources[number]() for number in range(len(self.names))]

    @cached_property
    def config(self) -> DecoderConfig:
        """The architecture that the experts share, without dropout."""
        return replace(self.sources[0].config, residual_dropout=0.0, attention_dropout=0.0)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hash of the files of each expert."""
        return {name: hash_folder(self.run.folder("ensemble") / "experts" / name) for name in self.names}

    @cached_property
    def routers_hash(self) -> str:
        """Hash of what the ensemble's routers are made from."""
        return hash_folder(self.run.folder("ensemble") / "router")

    def marker(self, stage: str) -> str:
        """Fingerprint of a stage of the run.

        Raises:
            MergeError: it is not made.
        """
        marker = self.run.marker(stage)
        if marker is None:
            raise MergeError(f"{self.run.folder(stage)}: not made yet: megaxelm run RECIPE --until {stage}")
        return str(marker["fingerprint"])


def open_material(run: RunFolder, device: torch.device | str = "cpu") -> Material:
    """The experts of a run whose ensemble is made, checked for being one family.

    Raises:
        MergeError: fewer than two experts, other architectures, or another seed.
        RoutingError, ModelError: the ensemble or an expert of it is missing or damaged.
    """
    material = Material(run, load_ensemble(run.folder("ensemble"), device=device))
    names = material.names
    if len(names) < 2:
        raise MergeError(f"{run.path}: has the expert {', '.join(names)} alone; merging takes at least two")
    first = arithmetic(material.sources[0].config)
    for name, source in zip(names, material.sources, strict=True):
        other = arithmetic(source.config)
        different = [field for field in vars(first) if getattr(first, field) != getattr(other, field)]
        if different:
            field = different[0]
            raise MergeError(
                f"experts {names[0]} and {name} differ in {field} ({getattr(first, field)!r}, {getattr(other, field)!r}): only experts of "
                "one architecture can be merged"
            )
    _check_ancestors(run, names)
    return material


def arithmetic(config: DecoderConfig) -> DecoderConfig:
    """What decides the arithmetic of a model: without dropout and the fields that are only carried along."""
    return replace(config, residual_dropout=0.0, attention_dropout=0.0, extra={})


def _check_ancestors(run: RunFolder, names: list[str]) -> None:
    """Weights that were drawn apart lie in other basins: their mean is no model. So all experts must lead back to one seed."""
    path = run.path / "lineage.json"
    if not path.is_file():
        return
    parents = {name: entry.get("parent") for name, entry in read_json(path, experts=dict)["experts"].items()}
    roots = {name: _root(name, parents) for name in names if name in parents}
    if len(set(roots.values())) > 1:
        said = ", ".join(f"{name} from {root}" for name, root in roots.items())
        raise MergeError(f"{path}: the experts do not branch from one seed ({said}); only models with a common ancestor can be merged")


def _root(name: str, parents: dict[str, str | None]) -> str:
    seen = set()
    while (parent := parents.get(name)) is not None and name not in seen:
        seen.add(name)
        name = parent
    return name


def hash_folder(folder: Path) -> str:
    """Hash over names and contents of all files of a folder."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()
