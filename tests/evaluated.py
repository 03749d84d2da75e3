"""The stages `ensemble` and `evaluation` on a run directory that has what they read."""

import json
from pathlib import Path
from typing import Any

from megaxelm.ensemble.stage import build_ensemble
from megaxelm.evaluate.stage import evaluate_run
from megaxelm.recipe import Recipe


def evaluate(run: Path, recipe: Recipe) -> dict[str, Any]:
    """Build the ensemble and evaluate; returns `results.json`."""
    build_ensemble(recipe, run, run / "ensemble")
    (run / "evaluation").mkdir()
    evaluate_run(recipe, run, run / "evaluation")
    results: dict[str, Any] = json.loads((run / "evaluation" / "results.json").read_text())
    return results
