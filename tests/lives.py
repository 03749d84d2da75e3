"""Trainings that are killed and started again: the lives of a run, what each read, and whether together they are one run.

`Lives` keeps one process that has imported everything and forks it for every rank of every life, so that a life costs about a second.
Product code knows nothing of this: what is recorded, and where a life ends, is patched into the forked process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Death:
    """Where a life ends by SIGKILL of all its ranks. `path` holds calls to be met one after the other, `module:attribute` and which call
    of it, counted from where the one before was met; the last of them is where `rank` kills, before or after the call. With `disk full` it
    lives on, and that call raises what a full disk does."""

    path: Sequence[tuple[str, int]]
    when: str = "before"
    rank: int = 0


@dataclass(frozen=True)
class Life:
    """How one start of the training ended. `codes` by rank, -9 where it was killed; `reads` (sample number, hash of its tokens) of all
    ranks in no certain order; `output` what it printed."""

    codes: list[int]
    reads: list[tuple[int, str]]
    output: str

    @property
    def first_sample(self) -> int | None:
        return min((sample for sample, _ in self.reads), default=None)


class Lives:
    """Starts lives. To be closed, or used as a context.

    Args:
        folder: for records and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels"))), "OMP_NUM_THREADS": "1"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        self.host = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.host.stdin is not None
        self.host.stdin.close()
        self.host.wait(timeout=60)
        assert self.host.stdout is not None
        self.host.stdout.close()

    def live(self, *arguments: str, ranks: int = 2, death: Death | None = None, seconds: float = 120.0) -> Life:
        """Train with `arguments` of `megaxelm.train` until the end, until `death`, or for `seconds` from the start of the ranks."""
        assert self.host.stdin is not None and self.host.stdout is not None
        self.number += 1
        record = self.folder / f"life-{self.number}"
        order = {"arguments": arguments, "ranks": ranks, "death": death and vars(death), "seconds": seconds, "record": str(record)}
        self.host.stdin.write(json.dumps(order) + "\n")
        self.host.stdin.flush()
        codes = json.loads(self.host.stdout.readline())
        reads = []
        for rank in range(ranks):
            path = Path(f"{record}.{rank}")
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            reads += [(int(sample), digest) for sample, digest in (line.split() for line in lines if line.endswith("\n"))]
        return Life(codes, reads, Path(f"{record}.log").read_text())


def faults(lives: Sequence[Life], whole: Life, samples: int) -> list[str]:
    """How the samples of `lives`, which make one run of `samples`, differ from those of a run never stopped; empty if they do not."""
    found = []
    wanted = dict(whole.reads)
    if sorted(wanted) != list(range(samples)):
        found.append(f"the run that was never stopped read {len(wanted)} samples, not {samples}")
    trained: list[int] = []
    for number, life in enumerate(lives):
        mine = sorted(sample for sample, _ in life.reads)
        if len(set(mine)) != len(mine):
            found.append(f"life {number} read a sample twice")
        found += [f"life {number} read something else as sample {sample}" for sample, digest in life.reads if wanted.get(sample) != digest]
        if mine:  # what it does again takes the place of what the lives before it did
            trained = [sample for sample in trained if sample < mine[0]] + mine
    if trained != list(range(samples)):
        found.append(f"samples lost or repeated: {len(trained)} trained on, {samples} wanted")
    return found


def _serve() -> None:
    """The host: one JSON order a line on stdin, one line of exit codes on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Imported before the fork, so that no life waits for it.
    import torch.utils.tensorboard  # noqa: F401
    import tqdm  # noqa: F401

    import megaxelm.train.checkpoint_writer
    import megaxelm.train.loop  # noqa: F401
    from megaxelm.train.environment import free_port

    for line in sys.stdin:
        order, port = json.loads(line), free_port()
        children: list[int] = []
        for rank in range(order["ranks"]):
            child = os.fork()
            if child == 0:
                _live(order, rank, port, children[0] if children else 0)
            children.append(child)
            os.setpgid(child, children[0])
        answers.write(json.dumps(_wait(children, order["seconds"])) + "\n")
        answers.flush()
        _import_what_was_imported(Path(f"{order['record']}.modules"))


def _import_what_was_imported(path: Path) -> None:
    """Import what a whole life imported while it ran, so that the next one need not."""
    for name in path.read_text().split() if path.exists() else ():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _wait(children: list[int], seconds: float) -> list[int]:
    """Exit codes of one life. Like a launcher, it ends the others some seconds after one has failed."""
    deadline = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
                if codes[child] != 0:
                    deadline = min(deadline, time.monotonic() + 5.0)
        if len(codes) < len(children) and time.monotonic() > deadline:
            os.killpg(children[0], signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[child] for child in children]


def _live(order: dict[str, Any], rank: int, port: int, group: int) -> None:
    """One rank of one life, in a forked process; never returns."""
    code = 1
    try:
        os.setpgid(0, group)
        log = os.open(f"{order['record']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()})
        _record_reads(Path(f"{order['record']}.{rank}"))
        if order["death"] and order["death"]["rank"] == rank:
            _plant([tuple(call) for call in order["death"]["path"]], order["death"]["when"])
        from megaxelm.train.__main__ import main

        code = main(order["arguments"])
        if rank == 0:
            Path(f"{order['record']}.modules").write_text("\n".join(list(sys.modules)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _record_reads(path: Path) -> None:
    """Write down every sample that is read, with a hash of its tokens."""
    import xxhash

    from megaxelm.corpus.sampling import Blend

    read, file = Blend.read, open(path, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process

    def recorded(blend: Blend, first: int, count: int) -> Any:
        windows = read(blend, first, count)
        for sample, tokens in zip(windows.samples.tolist(), windows.tokens, strict=True):
            file.write(f"{sample} {xxhash.xxh3_64_hexdigest(tokens.tobytes())}\n")
        file.flush()
        return windows

    Blend.read = recorded  # type: ignore[method-assign]


def _plant(path: list[tuple[str, int]], when: str) -> None:
    """Patch the first call of `path` to plant the rest of it when it is met, and the last one to kill."""
    (target, wanted), rest = path[0], path[1:]
    module, _, attribute = target.partition(":")
    *owners, name = attribute.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    function: Callable[..., Any] = getattr(owner, name)
    count = 0

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        met = count == wanted
        if met and rest:
            _plant(rest, when)
        elif met and when == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif met and when == "before":
            os.killpg(0, signal.SIGKILL)
        result = function(*args, **kwargs)
        if met and not rest:
            os.killpg(0, signal.SIGKILL)
        return result

    setattr(owner, name, patched)


if __name__ == "__main__":
    _serve()
