"""The token index on a disk of the node: copied once a node before training, checked, and read from there.

    srun --ntasks-per-node=1 python -m megaxelm.train.staging RUN NAME DIR

copies what the model NAME reads to `DIR/<fingerprint>/`; `MEGAXELM_INDEX` then tells the trainers of that node where it is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from megaxelm.console import run_guarded
from megaxelm.corpus.index_folder import MANIFEST, load_index_manifest
from megaxelm.corpus.token_index import index_paths
from megaxelm.errors import TrainError
from megaxelm.files import hash_file, hash_value, remove
from megaxelm.run import RunFolder

VARIABLE = "MEGAXELM_INDEX"


def find_index(run: RunFolder) -> Path:
    """The folder that training reads its tokens from: the staged one that `MEGAXELM_INDEX` names, or the run's.

    Raises:
        TrainError: what is named is no copy of this run's index.
    """
    own = run.folder("index")
    staged = os.environ.get(VARIABLE)
    if not staged:
        return own
    if not (Path(staged) / MANIFEST).is_file():
        raise TrainError(f"{VARIABLE} = {staged}: no token index lies there; stage it on every node, or unset the variable")
    if load_index_manifest(Path(staged)) != load_index_manifest(own):
        raise TrainError(f"{VARIABLE} = {staged}: belongs to another index than {own}; stage it again, or unset the variable")
    return Path(staged)


def staged_folder(run: RunFolder, place: Path) -> Path:
    """Where `stage_index` puts the index of a run: the same on every node, and another one for another index."""
    return place / f"megaxelm-{hash_value(load_index_manifest(run.folder('index')))[:16]}"


def stage_index(run: RunFolder, clusters: Iterable[str] | None, place: Path) -> Path:
    """Copy the indexes of some clusters, or of all, and check each copied file against the manifest. What is there already stays.

    Args:
        place: a folder on a disk of this node; processes that stage the same index take turns.

    Raises:
        TrainError: the place cannot hold it, or a copy is not what the manifest says.
    """
    source, target = run.folder("index"), staged_folder(run, place)
    known = load_index_manifest(source)["clusters"]
    target.mkdir(parents=True, exist_ok=True)
    with open(target / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = {}
        for cluster in sorted(known if clusters is None else clusters):
            for language, counts in known[cluster].items():
                for path in index_paths(source / cluster / language):
                    if not (target / cluster / path.name).exists():
                        files[path] = counts["xxh3"][path.suffix[1:]]
        needed = sum(path.stat().st_size for path in files)
        free = shutil.disk_usage(target).free
        if needed > free:
            raise TrainError(
                f"--stage {place}: {needed / 1e9:.2f} GB of token index, and {free / 1e9:.2f} GB are free there on {os.uname().nodename}: "
                "choose another disk, or train without --stage"
            )
        for path, wanted in files.items():
            _copy(path, target / path.relative_to(source), wanted)
        if not (target / MANIFEST).exists():
            _copy(source / MANIFEST, target / MANIFEST, hash_file(source / MANIFEST))
    print(f"{target} on {os.uname().nodename}: {len(files)} files, {needed / 1e6:.1f} MB copied and checked", flush=True)
    return target


def _copy(source: Path, target: Path, wanted: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.copying")
    shutil.copyfile(source, aside)
    if hash_file(aside) != wanted:
        remove(aside)
        raise TrainError(f"{target}: the copy is not what {source} held when it was made; see `megaxelm index verify`, and the node's disk")
    os.replace(aside, target)


def main(arguments: list[str]) -> int:
    from megaxelm.train.members import find_member, members_of_run

    def stage() -> None:
        run, name, place = RunFolder(arguments[0]), arguments[1], Path(arguments[2])
        stage_index(run, find_member(members_of_run(run, run.recipe()), name).clusters, place)

    return run_guarded(stage)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
