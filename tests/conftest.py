"""A small real run that several test folders start from, made once up to the token index."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_recipe, write_corpus

if not torch.cuda.is_available():
    # Triton reads this when it is imported, for its own functions too. Child processes are left as they are.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton

        triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
# Threads of several test processes on the same cores slow each other down many times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests that start DeepSpeed themselves use the extension that the installation compiled; those of the kernels do without all this.
with contextlib.suppress(ImportError):
    from megaxelm.train.extensions import extensions_folder

    extensions_folder()
# Names that are not folders must fail at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def _indexed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megaxelm.recipe import parse_recipe
    from megaxelm.run import RunFolder
    from megaxelm.stages import Stages

    base = tmp_path_factory.mktemp("tiny")
    recipe = parse_recipe(tiny_recipe(write_corpus(base / "corpus")))
    Stages(RunFolder(base / "runs" / "tiny"), recipe, say=lambda text: None).run(until="index")
    return base


@pytest.fixture
def indexed_run(_indexed_run: Path, tmp_path: Path) -> Path:
    """A run directory of its own, made up to the token index; the corpus it came from stays where it was."""
    shutil.copytree(_indexed_run / "runs" / "tiny", tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"
