"""What is evaluated: the models of a run, the mixtures of its ensemble, and the text that they read.

Three functions that the stage asks, and nobody else decides: `held_out_folders` (which languages, and where their text lies),
`models_to_score` (which models read it) and `plan_mixtures` (which mixtures are made of what the experts said).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaxelm.errors import StageError
from megaxelm.files import is_model_folder
from megaxelm.growth import Clusters, evaluated_languages, export_folder, held_clusters, read_growth
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from megaxelm.ensemble.folder import Ensemble
    from megaxelm.model.decoder import Decoder

BASELINES = ("seed", "dense")
LAPT = "lapt"
"""Kind of the models that are compared with grown experts (`lapt:<name>`)."""


@dataclass(frozen=True)
class Mixture:
    """A router with the number of experts that it keeps; None: the ensemble's own setting, which may be all."""

    router: str
    top_m: int | None
    own_setting: bool = True

    @property
    def key(self) -> str:
        """Its name in `documents.npz`."""
        return f"mixture:{self.router}" + ("" if self.own_setting else f"@{self.top_m}")

    @property
    def column(self) -> str:
        """Its name in `results.json`."""
        return self.key.replace(":", "-", 1)

    @property
    def label(self) -> str:
        """Its name for people."""
        return f"{self.router} mixture" + (f", top {self.top_m}" if self.top_m else "")


def model_key(name: str) -> str:
    """Key of a member of the run in `documents.npz`: `seed`, `dense` or `expert:<name>`."""
    return name if name in BASELINES else f"expert:{name}"


def index_clusters(run_folder: Path) -> Clusters:
    """Expert -> language -> counts of the training text it stands for; grown experts with the languages that they were grown for."""
    return held_clusters(run_folder, read_growth(run_folder))


def held_out_folders(run_folder: Path) -> dict[str, Path]:
    """Language -> folder of its held-out text, `<folder>/<language>.jsonl`, for every language that is evaluated."""
    return evaluated_languages(run_folder, read_growth(run_folder))


def grown_languages(run_folder: Path) -> set[str]:
    """Languages that were grown. The dense model never saw them, so it is no equal there: their comparison is LAPT."""
    return {code for item in read_growth(run_folder).experts for code in item.languages}


def models_to_score(recipe: Recipe, run_folder: Path, trained: Sequence[str]) -> dict[str, Callable[[], Decoder]]:
    """Key of every model that reads the held-out text -> how it is loaded.

    Args:
        trained: the experts of the ensemble, without its fallback.

    Raises:
        StageError: a model has no export.
    """
    growth = read_growth(run_folder)
    keys = {name: model_key(name) for name in ["seed", *(["dense"] if recipe.experts.dense else []), *trained]}
    keys |= {item.name: f"{LAPT}:{item.name}" for item in growth.comparisons}
    return {key: export_loader(export_folder(run_folder, name, growth), name) for name, key in keys.items()}


def plan_mixtures(recipe: Recipe, ensemble: Ensemble) -> list[Mixture]:
    """The mixtures: every router with the ensemble's top_m, and with each m of `evaluation.top_m`.

    Raises:
        StageError: an m out of range.
    """
    wanted, num_experts = recipe.evaluation, len(ensemble.trained)
    for m in wanted.top_m:
        if m > num_experts:
            raise StageError(f"evaluation.top_m = {m}: choose 1 to {num_experts}, the number of experts in this ensemble")
    found = [Mixture(router, recipe.ensemble.top_m) for router in wanted.routers]
    return found + [Mixture(router, m, False) for router in wanted.routers for m in wanted.top_m]


def own_experts(clusters: Mapping[str, Mapping[str, Mapping[str, int]]], languages: Sequence[str]) -> dict[str, str]:
    """Language -> the cluster with most of its training tokens; the first of equals."""
    return {
        language: max((name for name in clusters if language in clusters[name]), key=lambda name: clusters[name][language]["tokens"])
        for language in languages
    }


def scoring_device() -> str:
    """Where models are scored."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def export_loader(folder: Path, name: str) -> Callable[[], Decoder]:
    """How the model in an export folder is loaded for scoring, in float32.

    Raises:
        StageError: there is no export.
    """
    if not is_model_folder(folder):
        raise StageError(f"evaluation: `{name}` has no export in {folder}; make it: megaxelm run RECIPE --until experts")

    def load() -> Decoder:
        from megaxelm.model.hub import load_pretrained

        return load_pretrained(folder, dtype=torch.float32).to(scoring_device())

    return load
