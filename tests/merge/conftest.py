"""A run whose experts are ready to be merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from merge_run import finish_run

from megaxelm.merge.make import Merging
from megaxelm.merge.material import Material, open_material
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder


@pytest.fixture(scope="session")
def _finished(_indexed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("merge") / "tiny"
    shutil.copytree(_indexed_run / "runs" / "tiny", run)
    return finish_run(run, RunFolder(run).recipe())


@pytest.fixture
def run(_finished: Path, tmp_path: Path) -> RunFolder:
    """A run of its own: clusters of two languages each, their experts, the ensemble."""
    shutil.copytree(_finished, tmp_path / "tiny")
    return RunFolder(tmp_path / "tiny")


@pytest.fixture
def recipe(run: RunFolder) -> Recipe:
    return run.recipe()


@pytest.fixture(scope="session")
def material(_finished: Path) -> Material:
    """Of a run that nothing is written into."""
    return open_material(RunFolder(_finished))


@pytest.fixture
def merging(run: RunFolder, recipe: Recipe) -> Callable[[], Merging]:
    """What makes rungs, made anew; `said` holds what it has told."""

    def make() -> Merging:
        said: list[str] = []
        made = Merging(run, recipe, say=said.append)
        made.said = said  # type: ignore[attr-defined]
        return made

    return make
