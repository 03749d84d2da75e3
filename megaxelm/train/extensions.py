"""Compiled extensions of torch and DeepSpeed: where they lie, and locks that a killed process left behind.

torch keeps one build a user, Python and device. Two virtual environments then compile it anew in turn, since its include paths are those
of the environment, and while one trains the other's processes load a file that changes. So each environment has a folder of its own.

torch marks the building or loading of an extension by a file `lock`, which a killed process leaves; every later start then waits
for it without end and without a word. The holder keeps the file open, so a lock that nobody has open is nobody's.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from megaxelm.files import hash_value

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "f2fs"}
_PAUSE = 1.0  # a holder closes the file a moment before it removes it
_OTHER_NODES = 1800.0  # seconds after which a lock on a shared file system, whose holder may be on another machine, is nobody's


def extensions_folder() -> Path:
    """Where compiled extensions lie: TORCH_EXTENSIONS_DIR, which is set for this process and its children where it is not."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    key = hash_value([sys.prefix, sys.version, version("torch"), version("deepspeed")])[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaxelm" / "torch_extensions" / key
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def remove_stale_locks(root: Path) -> list[Path]:
    """Remove the locks below `root` whose holder is gone, and return them."""
    suspects = {lock: mark for lock, mark in _unheld(root)}
    if not suspects:
        return []
    time.sleep(_PAUSE)
    stale = [lock for lock, mark in _unheld(root) if suspects.get(lock) == mark]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _unheld(root: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Locks that no process of this machine has open, each with what tells it from a later one of that name."""
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # torch puts a folder for Python and device between where it chose the root
    held = _open_files() if locks else set()
    for lock in locks:
        with suppress(FileNotFoundError):
            stat = lock.stat()
            old = time.time() - stat.st_mtime > _OTHER_NODES
            if os.path.realpath(lock) not in held and (old or _file_system(lock) in _LOCAL):
                yield lock, (stat.st_ino, stat.st_mtime_ns)


def _open_files() -> set[str]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            for entry in os.scandir(folder):
                with suppress(OSError):
                    found.add(os.readlink(entry.path))
    return found


def _file_system(path: Path) -> str:
    """Type of the file system on which `path` lies, as in /proc/mounts."""
    real = os.path.realpath(path)
    best = ("", "")
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            mount, kind = line.split()[1:3]
            if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best[0]):
                best = (mount, kind)
    return best[1]
