"""The token index on a disk of the node: the same as the run's, or refused."""

from pathlib import Path

import pytest

from megaxelm.corpus.index_folder import open_streams
from megaxelm.errors import TrainError
from megaxelm.files import read_json, write_json
from megaxelm.run import RunFolder
from megaxelm.train import staging
from megaxelm.train.staging import VARIABLE, find_index, stage_index, staged_folder


def test_what_a_member_reads_is_copied_once_and_read_from_there(
    indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(indexed_run)
    assert find_index(run) == indexed_run / "index"
    staged = stage_index(run, ["bg-en"], tmp_path / "local")
    assert staged == staged_folder(run, tmp_path / "local") and "4 files" in capsys.readouterr().out
    assert sorted(path.name for path in staged.iterdir() if not path.name.startswith(".")) == ["bg-en", "manifest.json"]
    monkeypatch.setenv(VARIABLE, str(staged))
    assert find_index(run) == staged and sorted(open_streams(find_index(run), ["bg-en"])) == ["bg", "en"]
    stage_index(run, None, tmp_path / "local")
    assert "4 files" in capsys.readouterr().out, "the rest alone"
    for path in (indexed_run / "index").glob("*/*"):
        assert (staged / path.relative_to(indexed_run / "index")).read_bytes() == path.read_bytes()


def test_a_copy_of_another_index_or_none_is_refused(indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(indexed_run)
    staged = stage_index(run, None, tmp_path / "local")
    manifest = read_json(indexed_run / "index" / "manifest.json")
    write_json(indexed_run / "index" / "manifest.json", manifest | {"clusters_fingerprint": "another"})
    monkeypatch.setenv(VARIABLE, str(staged))
    with pytest.raises(TrainError, match="belongs to another index than"):
        find_index(run)
    assert staged_folder(run, tmp_path / "local") != staged
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(TrainError, match="no token index lies there"):
        find_index(run)


def test_a_copy_that_is_not_what_was_written_is_refused(indexed_run: Path, tmp_path: Path) -> None:
    path = next((indexed_run / "index").glob("*/en.bin"))
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainError, match=r"en.bin: the copy is not what .* held when it was made"):
        stage_index(RunFolder(indexed_run), None, tmp_path / "local")
    assert not list((tmp_path / "local").rglob("*en.bin*"))


def test_a_disk_that_is_too_small_is_told_before_copying(indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = staging.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainError, match="are free there on .*: choose another disk"):
        stage_index(RunFolder(indexed_run), None, tmp_path / "local")
