import json
from pathlib import Path

import pytest

from megaxelm.errors import CheckpointError
from megaxelm.train.checkpoint import Progress, complete_checkpoint, find_checkpoint
from megaxelm.train.metrics import Metrics, read_metrics

LAYOUT = {"ranks": 2, "zero_stage": 1}


def save(folder: Path, step: int, keep: int = 2) -> None:
    tag = folder / str(step)
    tag.mkdir(parents=True)
    (tag / "weights.pt").write_bytes(bytes(100))
    complete_checkpoint(folder, Progress(step, step * 8), LAYOUT, keep=keep)


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, LAYOUT) == (None, [])
    for step in (5, 10, 20):
        save(tmp_path, step)
    (tmp_path / "30").mkdir()
    progress, notes = find_checkpoint(tmp_path, LAYOUT)
    assert progress == Progress(20, 160)
    assert notes == ["checkpoint 30 is unfinished and ignored"]
    assert (tmp_path / "latest").read_text() == "20"
    assert not (tmp_path / "5").exists(), "only the two newest are kept"


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(bytes(99)), lambda path: path.write_bytes(b"x" * 100), lambda path: path.unlink()]
)
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, damage) -> None:
    save(tmp_path, 5)
    damage(tmp_path / "5" / "weights.pt")
    with pytest.raises(CheckpointError, match="weights.pt: damaged"):
        find_checkpoint(tmp_path, LAYOUT)


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="saved with ranks 2, zero_stage 1, and this training has ranks 4, zero_stage 1"):
        find_checkpoint(tmp_path, LAYOUT | {"ranks": 4})


def test_metrics_after_the_resumed_step_are_dropped_and_a_cut_line_too(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    metrics = Metrics(tmp_path, resume_step=2)
    metrics.write({"step": 3, "loss": 0.5})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]
