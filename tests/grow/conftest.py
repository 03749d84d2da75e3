"""A trained run, and the same with a grown language; made once, each test gets a copy."""

import shutil
from pathlib import Path

import pytest
from growing import grow_in, grow_recipe, stand_in, write_new_languages
from tiny_run import write_corpus

from megaxelm.recipe import parse_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages


@pytest.fixture
def really_train() -> None:
    """For a test that trains."""


@pytest.fixture(autouse=True)
def _stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "really_train" not in request.fixturenames:
        stand_in(monkeypatch)


@pytest.fixture(scope="session")
def _trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("grow")
    write_corpus(base / "corpus", documents=40)
    write_new_languages(base / "new")
    recipe = parse_recipe(grow_recipe(base))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        Stages(RunFolder(base / "runs" / "tiny"), recipe, say=lambda text: None).run(until="evaluation")
    return base / "runs" / "tiny"


@pytest.fixture(scope="session")
def _grown_run(_trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("grown") / "runs" / "tiny"
    shutil.copytree(_trained_run, run)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        grow_in(run, "az", lapt=True)
    return run


@pytest.fixture
def trained_run(_trained_run: Path, tmp_path: Path) -> Path:
    """A trained and evaluated run directory of its own: experts bg-en and de-ru."""
    return Path(shutil.copytree(_trained_run, tmp_path / "runs" / "tiny"))


@pytest.fixture
def grown_run(_grown_run: Path, tmp_path: Path) -> Path:
    """The same, with the expert az and its two comparisons."""
    return Path(shutil.copytree(_grown_run, tmp_path / "runs" / "tiny"))
