"""The preparation as tasks of a Ray that is started here."""

from pathlib import Path

import pytest
from pipeline_run import index_hashes, pipeline_recipe, prepare, write_files

from megaxelm.errors import CorpusError, StageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("ray")
    prepare(base / "run", pipeline_recipe(write_files(base / "corpus")))
    return base


def test_ray_makes_the_same_indexes_as_one_process(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    executor = {"kind": "ray", "workers": 2, "tasks": 3}
    tokenizer = made / "run" / "tokenizer"
    for name, settings in (("ray", executor), ("local", {})):
        prepare(tmp_path / name, pipeline_recipe(made / "corpus", tokenizer, executor=settings))
    assert index_hashes(tmp_path / "ray") == index_hashes(tmp_path / "local")


def test_a_mistake_in_a_task_of_ray_is_told_in_a_sentence(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    corpus = write_files(tmp_path / "corpus", files=2, documents=20)
    (corpus / "1.jsonl").write_text("{broken\n" * 5)
    with pytest.raises(CorpusError, match=r"1.jsonl: 5 of 5 documents are broken"):
        prepare(tmp_path / "run", pipeline_recipe(corpus, executor={"kind": "ray", "workers": 2}))


def test_a_ray_that_is_not_there_is_an_error(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    executor = {"kind": "ray", "ray_address": "127.0.0.1:1"}
    with pytest.raises(StageError, match=r"executor.ray_address = 127.0.0.1:1: no Ray cluster answers there"):
        prepare(tmp_path / "run", pipeline_recipe(made / "corpus", executor=executor))
