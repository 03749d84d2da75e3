"""The rungs of a run's merge ladder as ensembles of one, so that whatever takes an ensemble takes them: seed, dense, and what was
merged."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.ensemble.folder import Ensemble, EnsembleSettings, load_ensemble
from megaxelm.ensemble.routers import RouterData
from megaxelm.errors import StageError
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained, open_pretrained

MIXTURE = "mixture"


def rung_folders(run_folder: Path) -> dict[str, Path]:
    """Checkpoint folders of the single models of a run: seed and dense where they are trained, then what lies in `merged/`, by name."""
    found = {name: run_folder / "experts" / name / "export" for name in ("seed", "dense")}
    found |= {path.parent.name: path.parent for path in sorted((run_folder / "merged").glob("*/merge.json"))}
    return {name: path for name, path in found.items() if (path / "config.json").is_file() and not name.startswith(".")}


def choose_rungs(run_folder: Path, wanted: str) -> list[str]:
    """Names of the rungs that `wanted` means: `all`, or names by comma. `mixture` is the ensemble itself, the first of all.

    Raises:
        StageError: a name that there is not.
    """
    known = [MIXTURE, *rung_folders(run_folder)]
    if wanted == "all":
        return known
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"no rung {', '.join(unknown)}" if unknown else "names no rung"
        raise StageError(f"--rung {wanted}: {what}; this run has {', '.join(known)} (megaxelm merge makes more), or all")
    return names


def open_rung(run_folder: Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Ensemble:
    """A rung as an ensemble: the mixture, or one model alone with the run's tokenizer."""
    if name == MIXTURE:
        return load_ensemble(run_folder / "ensemble", dtype, device)
    folder = rung_folders(run_folder)[name]
    loader = partial(_load, folder, dtype, device)
    return Ensemble(
        [name],
        [loader],
        Tokenizer.load(run_folder / "tokenizer"),
        RouterData([name]),
        EnsembleSettings("uniform"),
        sources=[partial(open_pretrained, folder)],
        dtype=dtype,
        device=device,
    )


def _load(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    return load_pretrained(folder, dtype=dtype).to(device)
