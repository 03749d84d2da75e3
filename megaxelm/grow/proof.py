"""Proof that growing touches no other model: the weights of all, hashed before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from megaxelm.errors import GrowError
from megaxelm.files import is_model_folder
from megaxelm.growth import export_folder, read_growth
from megaxelm.lineage import record_event


def model_hashes(run_folder: Path) -> dict[str, str]:
    """Name -> hash of the weights in its export, read from the files: seed, dense, every expert, everything grown."""
    from megaxelm.model.hub import weights_hash

    growth = read_growth(run_folder)
    own = sorted(path.name for path in (run_folder / "experts").iterdir() if is_model_folder(path / "export"))
    return {name: weights_hash(export_folder(run_folder, name, growth)) for name in dict.fromkeys([*own, *growth.names])}


def record_untouched(run_folder: Path, what: str, before: Mapping[str, str], made: Collection[str]) -> dict[str, str]:
    """Hash all models again, write the event into the run's lineage, and look whether the old ones are the same.

    Args:
        what: the event in words. made: names of the models that were trained meanwhile; all others must be as they were.

    Returns:
        The hashes after.

    Raises:
        GrowError: a model that had no part in it has changed.
    """
    after = model_hashes(run_folder)
    record_event(run_folder, what, dict(before), after)
    touched = [name for name, value in before.items() if name not in made and after.get(name) != value]
    if touched:
        raise GrowError(
            f"{what}: the weights of {', '.join(touched)} are not what they were before, although no other model is written to here: "
            "another program has changed them meanwhile; train them again (megaxelm run RECIPE --from experts), or restore their export"
        )
    return after
