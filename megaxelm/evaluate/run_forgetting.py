"""The forgetting matrix of a run directory, from what its evaluation left there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megaxelm.errors import StageError
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.forgetting import forgetting_results, run_matrix
from megaxelm.evaluate.subjects import BASELINES, model_key
from megaxelm.files import read_json


def run_forgetting(run_folder: Path) -> dict[str, Any]:
    """`forgetting_results` of an evaluated run: those in `results.json`, or, where it was written before there were any, without intervals.

    Raises:
        StageError: the run has not been evaluated, or its results are damaged.
    """
    path = run_folder / "evaluation" / "results.json"
    if not path.is_file():
        raise StageError(f"{path}: no such file; evaluate the run first: megaxelm evaluate {run_folder}")
    results = read_json(path, languages=list, models=dict, experts=dict)
    if isinstance(results.get("forgetting"), dict):
        return dict(results["forgetting"])
    documents = _totals(results)
    own = {row["code"]: model_key(row["own"]) for row in results["languages"]}
    found = forgetting_results(run_matrix(documents, own, labels_of(results), read_parents(run_folder)))
    return found | {"notes": [*found["notes"], "evaluated before documents were kept: no intervals; evaluate again for them"]}


def labels_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Names for people of the mixtures, by their key in `documents.npz`."""
    return {key.replace("-", ":", 1): row["label"] for key, row in results["models"].items() if key.startswith("mixture-")}


def read_parents(run_folder: Path) -> dict[str, str | None]:
    """Key of every member of a run -> key of the one that it branched from; empty where there is no lineage."""
    path = run_folder / "lineage.json"
    members = read_json(path, experts=dict)["experts"] if path.is_file() else {}
    return {model_key(name): model_key(row["parent"]) if row.get("parent") else None for name, row in members.items()}


def _totals(results: Mapping[str, Any]) -> DocumentScores:
    """Each language as one document: what the results alone tell."""
    sizes = {row["code"]: (row["bytes"], row["tokens"]) for row in results["languages"]}
    bits = {
        key.replace("-", ":", 1): {code: found["bits_per_byte"] for code, found in row["languages"].items()}
        for key, row in results["models"].items()
        if key in BASELINES or key.startswith("mixture-")
    }
    bits |= {model_key(name): row for name, row in results["experts"].items()}
    order = [*(key for key in BASELINES if key in bits), *(key for key in bits if key.startswith("expert:")), *bits]
    return DocumentScores(
        {
            key: {code: np.array([value * math.log(2) * sizes[code][0]]) for code, value in bits[key].items()}
            for key in dict.fromkeys(order)
        },
        {code: np.array([size]) for code, (size, _) in sizes.items()},
        {code: np.array([tokens]) for code, (_, tokens) in sizes.items()},
    )
