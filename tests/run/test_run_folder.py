from pathlib import Path

import pytest

from megaxelm.errors import StageError
from megaxelm.files import read_json
from megaxelm.run import MadeFrom, RunFolder


def made(**settings: object) -> MadeFrom:
    return MadeFrom(settings, {"corpus": "a"}, {"de.jsonl": "1"})


def test_a_stage_is_fresh_only_when_made_from_the_same(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.status("tokenizer", made(size=1)) == "missing"
    with run.making("tokenizer", made(size=1)) as out:
        (out / "file").write_text("x")
    assert run.status("tokenizer", made(size=1)) is None
    assert run.status("tokenizer", made(size=2)) == "stale: size 1 -> 2"
    assert run.status("tokenizer", MadeFrom({"size": 1}, {"corpus": "b"}, {"de.jsonl": "1"})) == "stale: corpus was made again"
    assert run.status("tokenizer", MadeFrom({"size": 1}, {"corpus": "a"}, {"de.jsonl": "2"})) == "stale: source changed: de.jsonl"


def test_a_failed_stage_leaves_the_earlier_one_as_it_was(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.making("index", made(k=1)) as out:
        (out / "file").write_text("old")
    with pytest.raises(OSError), run.making("index", made(k=2)) as out:
        (out / "file").write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "index" / "file").read_text() == "old"
    assert run.status("index", made(k=1)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_a_folder_without_its_marker_is_unfinished(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    assert RunFolder(tmp_path).status("index", made()) == "unfinished"


def test_a_stale_expert_is_kept_aside_and_a_half_trained_one_goes_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.open_expert("en", made(lr=1)) is None
    (run.expert("en") / "weights").write_text("old")
    assert run.open_expert("en", made(lr=1)) is None
    assert (run.expert("en") / "weights").exists()
    assert run.open_expert("en", made(lr=2)) == "replaced/en-1"
    assert (tmp_path / "replaced" / "en-1" / "weights").read_text() == "old"
    assert not (run.expert("en") / "weights").exists()
    assert read_json(run.expert("en") / "made_from.json")["settings"] == {"lr": 2}


def test_two_makers_do_not_work_on_one_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock(), pytest.raises(StageError, match="another megaxelm works here .process"), RunFolder(tmp_path).lock():
        pass
    with RunFolder(tmp_path).lock():
        pass


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not a run directory"):
        RunFolder(tmp_path).recipe()


def test_a_damaged_marker_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "stage.json").write_text('{"settings": ')
    with pytest.raises(StageError, match="stage.json: damaged"):
        RunFolder(tmp_path).status("index", made())
