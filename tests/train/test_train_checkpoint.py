import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaxelm.errors import CheckpointError
from megaxelm.train import checkpoint_folder
from megaxelm.train.checkpoint import Checkpoints, Layout, Progress
from megaxelm.train.checkpoint_folder import (
    Files,
    complete_checkpoint,
    complete_steps,
    find_checkpoint,
    making,
    start_checkpoint,
    write_file,
)
from megaxelm.train.environment import Processes
from megaxelm.train.metrics import Metrics, read_metrics

LAYOUT = Layout(1, 1, "bf16")


class Engine:
    """As much of DeepSpeed's engine as checkpoints meet: a state of one number."""

    def __init__(self, value: float = 0.0) -> None:
        self.weights = torch.full((1000,), value)
        self.checkpoint_engine: Any = None
        self.saves = 0

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, int], save_latest: bool) -> None:
        assert not save_latest
        self.saves += 1
        self.checkpoint_engine.save(state_dict=client_state | {"weights": self.weights}, path=f"{folder}/{tag}/weights.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, int]]:
        state = torch.load(f"{folder}/{tag}/weights.pt")
        self.weights = state["weights"]
        return tag, state


def checkpoints_of(folder: Path, asynchronous: bool = False, keep: int = 1, keep_every: int | None = None) -> Checkpoints:
    alone = Processes(0, 1, 0, "a test")
    return Checkpoints(folder, LAYOUT, alone, keep=keep, keep_every=keep_every, asynchronous=asynchronous)


def save(folder: Path, step: int, keep: int = 2, keep_every: int | None = None) -> None:
    start_checkpoint(folder, step)
    files: Files = {"weights.pt": write_file(making(folder, step) / "weights.pt", lambda file: file.write(bytes(100)))}
    complete_checkpoint(folder, Progress(step, step * 8), LAYOUT, files, keep, keep_every)


def test_the_newest_complete_checkpoint_is_found_and_what_a_kill_left_is_told(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing") == (None, [])
    for step in (5, 10, 20):
        save(tmp_path, step)
    start_checkpoint(tmp_path, 30)
    (tmp_path / "25").mkdir()
    saved, notes = find_checkpoint(tmp_path)
    assert saved is not None and saved.progress == Progress(20, 160) and saved.layout == LAYOUT
    assert notes == [f"{tmp_path / name}: an unfinished checkpoint, ignored" for name in (".30.making", "25")]
    assert (tmp_path / "latest").read_text() == "20"
    save(tmp_path, 40)
    assert {path.name for path in tmp_path.iterdir()} == {"20", "40", "latest"}, "two are kept, and nothing unfinished"


def test_checkpoints_at_multiples_of_keep_every_stay_besides_the_newest(tmp_path: Path) -> None:
    for step in range(2, 15, 2):
        save(tmp_path, step, keep=2, keep_every=4)
    assert complete_steps(tmp_path) == [4, 8, 12, 14]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(bytes(99)),
        lambda path: path.write_bytes(b"x" * 100),
        lambda path: path.unlink(),
    ],
    ids=["cut", "changed", "gone"],
)
def test_a_damaged_checkpoint_is_an_error_that_names_the_file_and_the_way_out(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    damage(tmp_path / "10" / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights.pt: damaged since it was written; remove the folder .*10 to resume from"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ['{"step": 10', '{"step": 10, "samples": 80, "layout": {"ranks": 2}, "files": {}}'])
def test_a_damaged_marker_is_told(tmp_path: Path, text: str) -> None:
    save(tmp_path, 10)
    (tmp_path / "10" / "complete.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"complete.json: damaged; remove the folder"):
        find_checkpoint(tmp_path)


def test_the_order_on_disk_is_files_marker_rename_latest_each_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, keep=1)
    done: list[str] = []
    os = checkpoint_folder.os
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(handle: int) -> None:
        done.append("fsync " + Path(f"/proc/self/fd/{handle}").resolve().name)
        real["fsync"](handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda old, new, name=name: (done.append(f"{name} {Path(new).name}"), real[name](old, new)))
    save(tmp_path, 10, keep=1)
    done = ["fsync marker" if "complete.json." in entry else entry for entry in done]
    marker = ["fsync marker", "replace complete.json", "fsync .10.making"]
    renamed = ["rename 10", f"fsync {tmp_path.name}"]
    latest = ["fsync .latest.new", "replace latest", f"fsync {tmp_path.name}"]
    assert done == ["fsync weights.pt", *marker, *renamed, *latest, "rename .5.old"]


def test_a_file_that_another_rank_wrote_out_of_sight_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_folder, "_ARRIVAL_SECONDS", 0.0)
    start_checkpoint(tmp_path, 5)
    with pytest.raises(CheckpointError, match="a file system that all nodes share"):
        complete_checkpoint(tmp_path, Progress(5, 40), LAYOUT, {"rank1.pt": {"bytes": 7, "xxh3": "0"}}, 1, None)
    assert complete_steps(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_loaded_again(tmp_path: Path, asynchronous: bool, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints, engine = checkpoints_of(tmp_path, asynchronous), Engine(1.0)
    assert checkpoints.resume(engine) == Progress(0, 0)
    for step in (2, 4):
        engine.weights.fill_(step)
        checkpoints.save(engine, Progress(step, step * 8))
        engine.weights.fill_(-1)  # training goes on
    checkpoints.finish()
    assert (tmp_path / "latest").read_text() == "4"
    later = Engine()
    assert checkpoints_of(tmp_path).resume(later) == Progress(4, 32)
    assert later.weights.tolist() == [4.0] * 1000
    assert capsys.readouterr().out.count("GiB more in memory") == asynchronous
    assert engine.checkpoint_engine is None, "DeepSpeed's own engine is put back"


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    checkpoints, engine = checkpoints_of(tmp_path), Engine(1.0)
    for _ in range(2):
        checkpoints.save(engine, Progress(2, 16))
    resumed = checkpoints_of(tmp_path)
    resumed.resume(engine)
    resumed.save(engine, Progress(2, 16))
    assert engine.saves == 1


def test_resuming_sets_latest_right(tmp_path: Path) -> None:
    checkpoints_of(tmp_path).save(Engine(1.0), Progress(2, 16))
    (tmp_path / "latest").write_text("1")
    checkpoints_of(tmp_path).resume(Engine())
    assert (tmp_path / "latest").read_text() == "2"


def test_asynchronous_saving_does_not_hold_training_up_and_writes_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, complete = threading.Event(), checkpoint_folder.complete_checkpoint

    def waiting(*arguments: Any) -> None:
        assert go_on.wait(timeout=60)
        complete(*arguments)

    monkeypatch.setattr("megaxelm.train.checkpoint.complete_checkpoint", waiting)
    checkpoints, engine = checkpoints_of(tmp_path, asynchronous=True), Engine(2.0)
    checkpoints.save(engine, Progress(2, 16))
    assert complete_steps(tmp_path) == []
    second = threading.Thread(target=checkpoints.save, args=(engine, Progress(4, 32)))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive() and not making(tmp_path, 4).exists(), "the second waits for the first"
    go_on.set()
    second.join(timeout=60)
    checkpoints.finish()
    assert complete_steps(tmp_path) == [4]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_asynchronous_saving_writes_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    threads: list[str] = []

    def watched(path: Path, fill: Callable[[Any], object]) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return write_file(path, fill)

    monkeypatch.setattr("megaxelm.train.checkpoint_writer.write_file", watched)
    checkpoints = checkpoints_of(tmp_path, asynchronous)
    checkpoints.save(Engine(1.0), Progress(2, 16))
    checkpoints.finish()
    assert threads == ["checkpoint" if asynchronous else "MainThread"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    checkpoints, engine = checkpoints_of(tmp_path, asynchronous), Engine(1.0)
    checkpoints.save(engine, Progress(2, 16))
    checkpoints.finish()
    monkeypatch.setattr(checkpoint_folder, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"step 4 could not be written \(rank 0: .*No space left on device\): free some space"):
        checkpoints.save(engine, Progress(4, 32))
        checkpoints.finish()
    monkeypatch.undo()
    assert checkpoints_of(tmp_path).resume(engine) == Progress(2, 16)


def test_metrics_after_the_resumed_step_are_dropped_and_a_cut_line_too(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    metrics = Metrics(tmp_path, resume_step=2)
    metrics.write({"step": 3, "loss": 0.5})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]
