"""The preparation as array jobs of a real Slurm with two nodes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pipeline_run import index_hashes, pipeline_recipe, prepare, write_files
from tiny_run import REPOSITORY

from megaxelm.errors import CorpusError, StageError

pytestmark = pytest.mark.slurm


@pytest.fixture
def environment(slurm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    # what sbatch hands on to the jobs
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "tests"))))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_two_nodes_make_the_same_indexes_as_one_process(environment: None, tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus", files=6, documents=200)
    prepare(tmp_path / "local", pipeline_recipe(corpus, executor={"block_bytes": 20_000}))
    tokenizer = tmp_path / "local" / "tokenizer"
    for name, executor in {
        "local": {"block_bytes": 20_000},
        "slurm": {"kind": "slurm", "tasks": 4, "block_bytes": 20_000, "slurm": {"time": "00:10:00", "memory_gb_per_cpu": None}},
    }.items():
        prepare(tmp_path / f"{name}-run", pipeline_recipe(corpus, tokenizer, executor={"workers": None} | executor))
    assert index_hashes(tmp_path / "slurm-run") == index_hashes(tmp_path / "local-run")
    nodes = subprocess.run(["scontrol", "show", "jobs", "-o"], capture_output=True, text=True).stdout
    assert "NodeList=n1" in nodes and "NodeList=n2" in nodes


def test_a_mistake_on_a_node_is_told_in_a_sentence(environment: None, tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus", files=3, documents=30)
    (corpus / "1.jsonl").write_text("{broken\n" * 5)
    executor = {"kind": "slurm", "tasks": 2, "workers": None, "slurm": {"time": "00:10:00", "memory_gb_per_cpu": None}}
    with pytest.raises(CorpusError, match=r"1.jsonl: 5 of 5 documents are broken"):
        prepare(tmp_path / "run", pipeline_recipe(corpus, executor=executor))


def test_a_task_that_is_killed_is_told_and_the_next_run_goes_on(environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_files(tmp_path / "corpus", files=2, documents=30)
    # a task that waits for ever in the middle of an input: a pipe that nobody writes to
    os.mkfifo(corpus / "waits.jsonl")
    executor = {"kind": "slurm", "tasks": 3, "workers": None, "slurm": {"time": "00:10:00", "memory_gb_per_cpu": None}}
    recipe = pipeline_recipe(corpus, executor=executor)
    monkeypatch.setattr("megaxelm.corpus.inputs.os.path.isfile", lambda path: os.path.exists(path))
    monkeypatch.setattr("megaxelm.corpus.inputs._file_value", lambda address: f"1:{Path(address).name}")
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 90
        scans = tmp_path / "run" / "shards" / "scan"
        while time.monotonic() < deadline and not killed:
            time.sleep(0.2)
            if scans.exists() and len([path for path in scans.iterdir() if not path.name.startswith(".")]) == 2:
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        command = path.read_bytes().decode(errors="replace")
                    except OSError:
                        continue
                    if "launch_pickled_pipeline" in command and str(tmp_path) in command and "srun" not in command.split("\0")[0]:
                        os.kill(int(path.parent.name), signal.SIGKILL)
                        killed.append(int(path.parent.name))

    import threading

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StageError, match=r"1 of 3 parts are unfinished: a task failed or was killed"):
        prepare(tmp_path / "run", recipe, until="corpus")
    killer.join()
    assert killed
    finished = [path for path in (tmp_path / "run" / "shards" / "scan").iterdir() if not path.name.startswith(".")]
    before = {path.name: path.stat().st_mtime_ns for path in finished}
    assert len(before) == 2
    (corpus / "waits.jsonl").unlink()
    lines = [json.dumps({"id": str(i), "language": "en", "text": f"late text {i}"}) for i in range(20)]
    (corpus / "waits.jsonl").write_text("\n".join(lines) + "\n")
    prepare(tmp_path / "run", recipe, until="corpus")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "shards" / "scan").iterdir()}
    assert len(after) == 3 and after.items() >= before.items()
