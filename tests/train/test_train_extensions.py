"""A lock that a killed process left is removed; one that is held, or may be held on another machine, stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaxelm.train import extensions
from megaxelm.train.extensions import extensions_folder, remove_stale_locks


def make_lock(root: Path) -> Path:
    lock = root / "py311_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_PAUSE", 0.05)


def test_a_lock_whose_holder_was_killed_is_removed(tmp_path: Path) -> None:
    # torch's own lock, in a process that is killed while it holds it.
    (tmp_path / "py311_cpu" / "some_op").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "some_op" / "lock"
    code = f"from torch.utils.file_baton import FileBaton\nFileBaton({str(lock)!r}).try_acquire()\nprint('held', flush=True)\ninput()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert remove_stale_locks(tmp_path) == [] and lock.exists(), "it is held"
    holder.kill()
    holder.communicate()
    assert lock.exists()
    assert remove_stale_locks(tmp_path) == [lock] and not lock.exists()


def test_a_lock_on_a_shared_file_system_must_be_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = make_lock(tmp_path)
    monkeypatch.setattr(extensions, "_file_system", lambda path: "nfs4")
    assert remove_stale_locks(tmp_path) == []
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert remove_stale_locks(tmp_path) == [lock]


def test_a_lock_that_is_taken_anew_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = make_lock(tmp_path)

    def anew(seconds: float) -> None:
        lock.unlink()
        lock.touch()
        os.utime(lock, ns=(1, 1))

    monkeypatch.setattr(time, "sleep", anew)
    assert remove_stale_locks(tmp_path) == [] and lock.exists()


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    assert extensions._file_system(Path("/proc/self/status")) == "proc"


def test_each_environment_has_its_folder_and_a_given_one_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder_of(prefix: str) -> Path:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(extensions.sys, "prefix", prefix)
        return extensions_folder()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = folder_of("/one")
    assert tmp_path in one.parents
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(one), "torch and the children find it"
    assert folder_of("/two") != one
    assert folder_of("/one") == one
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    assert extensions_folder() == Path("/elsewhere")
