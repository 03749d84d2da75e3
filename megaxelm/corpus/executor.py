"""Units of work done by datatrove on this machine, by Slurm or by Ray.

A step of the preparation is a list of units (inputs, blocks, indexes), each of which leaves a finished result under a name of its own.
Which process does which unit never shows in a result, a unit that is done is not done again, and what was finished before a kill stays.
Workers report through small files beside their results: mistakes, to be told in a sentence, and how far they are, for the bar.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from tqdm import tqdm

from megaxelm import errors
from megaxelm.errors import MegaxelmError, StageError
from megaxelm.files import write_json
from megaxelm.recipe import ExecutorConfig

_TASKS_PER_WORKER = 8
_CLUSTER_TASKS = 64
_BYTES_PER_PROCESS = 8 << 20
_MISTAKES_PER_TASK = 5
_REPORT_SECONDS = 0.5
_POLL_SECONDS = 2.0


class Progress:
    """What one task has done, written to a file now and then."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.counts = {"units": 0, "documents": 0, "bytes": 0, "tokens": 0}
        self._written = 0.0

    def add(self, **counts: int) -> None:
        """Add to units, documents, bytes or tokens."""
        for name, count in counts.items():
            self.counts[name] += count
        if self.path is not None and time.monotonic() - self._written > _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the counts; a bar that cannot be updated stops nothing."""
        if self.path is not None:
            self._written = time.monotonic()
            with contextlib.suppress(OSError):
                write_json(self.path, self.counts)


class UnitsStep(PipelineStep):
    """A datatrove step that does the units of work that are not done yet, each once.

    `reports` is a folder for the reports of the workers; on a cluster all nodes must see it, and the results.
    """

    type = "MegaXELM"
    name = "units"
    size_is_text = False
    """Whether `size` counts the bytes that progress counts, so that the bar knows its end."""

    def __init__(self, count: int, reports: Path) -> None:
        super().__init__()
        self.count = count
        self.reports = reports
        self.todo: list[int] = []

    @abstractmethod
    def size(self, unit: int) -> int:
        """Bytes of a unit, about: little work is not worth many processes."""

    @abstractmethod
    def is_done(self, unit: int) -> bool:
        """Whether the result of a unit is there, whole."""

    @abstractmethod
    def do(self, unit: int, progress: Progress) -> None:
        """Make the result of a unit, atomically."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the units of one task. Mistakes of the user are written down, so that one run names several of them."""
        progress = Progress(self.reports / f"progress-{rank}.json")
        mistakes = 0
        for unit in self.todo[rank::world_size]:
            if self.is_done(unit):
                continue
            try:
                self.do(unit, progress)
            except MegaxelmError as error:
                write_json(self.reports / f"error-{unit:08d}.json", {"kind": type(error).__name__, "text": str(error)})
                mistakes += 1
                if mistakes == _MISTAKES_PER_TASK:
                    break
            progress.add(units=1)
        progress.flush()


def run_units(step: UnitsStep, config: ExecutorConfig, title: str) -> None:
    """Do all units of a step that are not done, with a bar.

    Raises:
        MegaxelmError: what the units raised, the texts of several in one.
        StageError: a worker was killed or failed.
    """
    step.todo = [unit for unit in range(step.count) if not step.is_done(unit)]
    if not step.todo:
        return
    # A folder that all nodes see; what an earlier run left in it would be taken for this one's.
    shutil.rmtree(step.reports, ignore_errors=True)
    step.reports.mkdir(parents=True)
    size = sum(step.size(unit) for unit in step.todo)
    executor = make_executor(step, config, size)
    with _bar(step, title, size if step.size_is_text else None):
        executor.run()
    _raise_mistakes(step)
    left = [unit for unit in step.todo if not step.is_done(unit)]
    if left:
        raise StageError(
            f"{title}: {len(left)} of {step.count} parts are unfinished: a task failed or was killed; its log is in {step.reports}. "
            "Start the same command again: what was finished stays"
        )
    shutil.rmtree(step.reports, ignore_errors=True)


def make_executor(step: UnitsStep, config: ExecutorConfig, size: int) -> PipelineExecutor:
    """The executor that a recipe asks for, with as many tasks as the work is worth."""
    common: dict[str, Any] = {"pipeline": [step], "logging_dir": str(step.reports), "skip_completed": False}
    if config.kind == "local":
        workers = config.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        if config.workers is None:
            workers = min(workers, 1 + size // _BYTES_PER_PROCESS)
        tasks = min(config.tasks or _TASKS_PER_WORKER * workers, len(step.todo))
        return LocalExecutor(**common, tasks=tasks, workers=min(workers, tasks))
    tasks = min(config.tasks or _CLUSTER_TASKS, len(step.todo))
    if config.kind == "ray":
        return RayExecutor(**common, tasks=tasks, workers=config.workers or -1, address=config.ray_address)
    slurm = config.slurm
    return SlurmExecutor(
        **common,
        tasks=tasks,
        workers=config.workers or -1,
        time=slurm.time,
        partition=slurm.partition,
        qos=slurm.qos,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.memory_gb_per_cpu,
        sbatch_args=dict(slurm.sbatch),
        job_name="megaxelm",
        mail_type="NONE",
        # the interpreter at hand, wherever it comes from
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
    )


class LocalExecutor(PipelineExecutor):
    """Processes on this machine.

    datatrove's own waits for ever when one of its workers is killed, and shows every mistake as a traceback; this one ends with the first
    worker that dies, and ends its workers when it is interrupted itself.
    """

    def __init__(self, pipeline: list[Any], tasks: int, workers: int, logging_dir: str, skip_completed: bool) -> None:
        super().__init__(pipeline, logging_dir, skip_completed)
        self.tasks = tasks
        self.workers = workers

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        raise StageError("the local executor has no nodes")

    def run(self) -> None:
        if self.workers == 1:
            for rank in range(self.tasks):
                _run_task(self.pipeline, rank, self.tasks)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megaxelm.corpus.executor", "numpy"])
        counter = context.Value("l", 0)
        workers = [
            context.Process(target=_work, args=(self.pipeline, counter, self.tasks), daemon=True, name=f"megaxelm-{number}")
            for number in range(self.workers)
        ]
        try:
            for worker in workers:
                worker.start()
            running: dict[Any, Any] = {worker.sentinel: worker for worker in workers}
            while running:
                for sentinel in connection.wait(list(running)):
                    worker = running.pop(sentinel)
                    worker.join()
                    if worker.exitcode:
                        raise StageError(_about_the_end(worker.exitcode))
        finally:
            for worker in workers:
                if worker.pid is not None and worker.is_alive():
                    worker.terminate()
            for worker in workers:
                if worker.pid is not None:
                    worker.join()


class SlurmExecutor(SlurmPipelineExecutor):
    """Array jobs: submits them, waits, and cancels them when it is interrupted."""

    def run(self) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ and os.environ.get("RUN_OFFSET") is not None:
            super().run()  # inside of a task
            return
        if shutil.which("sbatch") is None:
            raise StageError("executor: slurm needs sbatch, which is not on the PATH; log in to the cluster, or use executor: local")
        from loguru import logger

        logger.remove()
        try:
            self.launch_job()
        except subprocess.CalledProcessError as error:
            raise StageError(f"executor: slurm: sbatch refused the job ({error}); check executor.slurm") from None
        try:
            while _is_queued(self.job_id):
                time.sleep(_POLL_SECONDS)
        except BaseException:
            subprocess.run(["scancel", str(self.job_id)], check=False)
            raise

    def launch_merge_stats(self) -> None:
        """Nothing: the counts are in the results."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """datatrove's, without what the recipe leaves to the cluster."""
        found = super().get_sbatch_args(max_array)
        return {key: value for key, value in found.items() if value is not None and value != "NoneG"}


class RayExecutor(RayPipelineExecutor):
    """Tasks of a Ray cluster, or of a Ray that is started here."""

    def __init__(self, address: str | None, **settings: Any) -> None:
        from loguru import logger

        logger.remove()
        super().__init__(**settings, mem_per_cpu_gb=1)
        self.address = address

    def run(self) -> None:
        try:
            import ray
        except ImportError:
            raise StageError("executor: ray needs the extra `scale`: pip install 'megaxelm[scale]'") from None
        started = not ray.is_initialized()
        if started:
            self._check_address()
            # Ray takes SIGTERM for itself, and this program has its own way to end
            before = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
            except ConnectionError as error:
                raise StageError(f"executor.ray_address = {self.address}: no Ray cluster answers there ({error})") from None
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)
        try:
            super().run()
        finally:
            if started:
                ray.shutdown()

    def _check_address(self) -> None:
        """Ray itself would try a wrong address for many minutes."""
        host, _, port = (self.address or "").removeprefix("ray://").rpartition(":")
        if not port.isdigit():
            return  # none, or a word such as `auto`
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise StageError(f"executor.ray_address = {self.address}: no Ray cluster answers there ({error})") from None


def _run_task(pipeline: list[Any], rank: int, world_size: int) -> None:
    data = None
    for step in pipeline:
        data = step(data, rank, world_size)


def _work(pipeline: list[Any], counter: Any, tasks: int) -> None:
    """One worker: takes the next task until there is none."""
    import threadpoolctl

    # the terminal sends its interrupt to all; the parent, who ends the workers, says it once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    from megaxelm.console import run_guarded

    def work() -> None:
        with threadpoolctl.threadpool_limits(1):
            while True:
                with counter.get_lock():
                    rank = counter.value
                    counter.value += 1
                if rank >= tasks:
                    return
                _run_task(pipeline, rank, tasks)

    sys.exit(run_guarded(work))


def _end_with(sentinel: int) -> None:
    """End this worker when its parent has gone."""
    connection.wait([sentinel])
    os._exit(1)


def _about_the_end(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        why = f"a worker was killed ({name}); if nobody did that, memory ran out: lower executor.workers or executor.block_bytes"
    else:
        why = f"a worker failed (exit code {code}); what it printed is above"
    return f"{why}. Start the same command again: what was finished stays"


def _is_queued(job: Any) -> bool:
    done = subprocess.run(["squeue", "-h", "-j", str(job), "-o", "%T"], capture_output=True, text=True, check=False)
    # a job that has left the queue long enough ago is an error to squeue
    return done.returncode == 0 and bool(done.stdout.strip())


def _raise_mistakes(step: UnitsStep) -> None:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(step.reports.glob("error-*.json"))]
    if not found:
        return
    texts = list(dict.fromkeys(item["text"] for item in found))
    kind = getattr(errors, found[0]["kind"], StageError)
    if len(texts) == 1:
        raise kind(texts[0])
    shown = "\n".join(f"- {text}" for text in texts[:10])
    raise kind(f"{len(texts)} parts could not be done:\n{shown}" + ("\n- ..." if len(texts) > 10 else ""))


@contextlib.contextmanager
def _bar(step: UnitsStep, title: str, total_bytes: int | None) -> Iterator[None]:
    """A bar over what the tasks report: text in bytes, and documents, tokens and finished parts beside it."""
    stop = threading.Event()
    bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5, leave=total_bytes is None)

    def show() -> None:
        counts = {"units": 0, "documents": 0, "bytes": 0, "tokens": 0}
        for path in step.reports.glob("progress-*.json"):
            with contextlib.suppress(OSError, ValueError):
                for name, count in json.loads(path.read_text(encoding="utf-8")).items():
                    counts[name] += count
        shown = {"parts": f"{counts['units']}/{len(step.todo)}"}
        bar.set_postfix(shown | {name: f"{counts[name]:,}" for name in ("documents", "tokens") if counts[name]}, refresh=False)
        bar.update(counts["bytes"] - bar.n)

    def watch() -> None:
        while not stop.wait(_REPORT_SECONDS):
            show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        show()
        bar.close()
