"""Checkpoints of a training run: DeepSpeed's files, made trustworthy (see checkpoint_folder.py), resumed on whatever ranks there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megaxelm.errors import CheckpointError
from megaxelm.train.checkpoint_folder import (
    Files,
    Layout,
    Progress,
    Saved,
    complete_checkpoint,
    find_checkpoint,
    making,
    point_latest,
    start_checkpoint,
)
from megaxelm.train.environment import Processes

__all__ = ["Checkpoints", "Layout", "Progress"]

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one model in training. Every method is collective: all ranks call it.

    Args:
        folder: `checkpoints/` of the model.
        layout: of this training.
        keep: newest checkpoints that stay.
        keep_every: checkpoints at multiples of so many steps stay for good.
        asynchronous: write while training goes on, from a copy of the state in memory; at most one at a time.
        partial: parts of the model are frozen; they come from the parent and are in no checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        processes: Processes,
        *,
        keep: int,
        keep_every: int | None,
        asynchronous: bool,
        partial: bool = False,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.processes = processes
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self.partial = partial
        self._saved_step = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._group: Any = None  # of all ranks; the thread's own, so that its messages never meet those of the training
        self._told_memory = False

    def resume(self, engine: Any) -> Progress:
        """Load the newest complete checkpoint into `engine`; what is unfinished is told and ignored.

        With the layout it was saved in, training goes on bit for bit. Saved by another number of ranks, ZeRO stage or precision, the fp32
        weights, both moments of Adam and its step are carried over exactly; sums over ranks then round in another order, so later losses
        agree with those of an uninterrupted run to about 1e-5 in fp32 and 1e-2 in bf16 (relative), and fp16 begins with a new scale of
        the loss.

        Raises:
            CheckpointError: it is damaged.
        """
        saved = self._on_first_rank(self._find)
        if saved is None:
            return Progress(0, 0)
        if saved.layout == self.layout:
            loose = {"load_module_strict": False} if self.partial else {}
            loaded, state = engine.load_checkpoint(str(self.folder), tag=saved.folder.name, **loose)
            assert loaded is not None and state["step"] == saved.progress.step, "a verified checkpoint loads"
        else:
            self._carry_over(saved, engine)
        self._saved_step = saved.progress.step
        return saved.progress

    def save(self, engine: Any, progress: Progress) -> float:
        """Save the state after `progress`; returns the seconds for which training waited. A step that is saved already is not saved again.

        Raises:
            CheckpointError: a rank could not write, now or in the asynchronous saving before.
        """
        from megaxelm.train.checkpoint_writer import Writer

        began = time.monotonic()
        self.finish()
        if progress.step == self._saved_step:
            return time.monotonic() - began
        self._on_first_rank(lambda: start_checkpoint(self.folder, progress.step))
        writer = Writer(in_memory=self.asynchronous)
        state = {"step": progress.step, "samples": progress.samples}
        before, engine.checkpoint_engine = engine.checkpoint_engine, writer
        try:
            part = {"exclude_frozen_parameters": True} if self.partial else {}
            tag = making(self.folder, progress.step).name
            engine.save_checkpoint(str(self.folder), tag=tag, client_state=state, save_latest=False, **part)
        finally:
            engine.checkpoint_engine = before
        if self.asynchronous:
            self._tell_memory(writer.copied_bytes)
            self._start_thread(writer, progress)
        else:
            self._complete(writer, progress)
        self._saved_step = progress.step
        return time.monotonic() - began

    def finish(self) -> None:
        """Wait until the last checkpoint is complete on disk.

        Raises:
            CheckpointError: a rank could not write it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _find(self) -> Saved | None:
        saved, notes = find_checkpoint(self.folder)
        for note in notes:
            print(note, flush=True)
        if saved is not None:  # a kill may have come between the folder's name and `latest`
            point_latest(self.folder, saved.progress.step)
        return saved

    def _carry_over(self, saved: Saved, engine: Any) -> None:
        from megaxelm.train.fill import fill_engine
        from megaxelm.train.zero_state import CheckpointState

        state = CheckpointState.open(saved.folder)
        fill_engine(engine, state.weight, state.moments, state.optimizer_step)
        engine.global_steps, engine.global_samples = saved.progress.step, saved.progress.samples
        if self.processes.rank == 0:
            print(f"resumed from step {saved.progress.step}, saved by {saved.layout}; now {self.layout}", flush=True)

    def _tell_memory(self, copied_bytes: int) -> None:
        if self.processes.rank == 0 and not self._told_memory:
            size = copied_bytes / 2**30
            print(f"train.async_checkpoints: rank 0 holds {size:.3g} GiB more in memory while a checkpoint is written", flush=True)
        self._told_memory = True

    def _start_thread(self, writer: Any, progress: Progress) -> None:
        if self._group is None and self.processes.world_size > 1:
            self._group = dist.new_group(backend="gloo")

        def write() -> None:
            try:
                self._complete(writer, progress)
            except BaseException as error:  # raised again by `finish`, where training sees it
                self._failure = error

        # A daemon: when training fails, what is half written is not waited for, and the next start ignores it.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _complete(self, writer: Any, progress: Progress) -> None:
        """Write what is not yet on disk; when all ranks have, rank 0 makes the checkpoint count."""
        writer.flush()
        parts: list[tuple[Files, str | None]] = [(writer.files, writer.error)]
        if self.processes.world_size > 1:
            parts *= self.processes.world_size
            dist.all_gather_object(parts, (writer.files, writer.error), group=self._group)
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error is not None]
        if failed:
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {progress.step} could not be written ({'; '.join(failed)}): free some space and "
                "start the same command again; earlier checkpoints stay"
            )
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        self._on_first_rank(lambda: complete_checkpoint(self.folder, progress, self.layout, files, self.keep, self.keep_every))

    def _on_first_rank(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, which alone looks at the folder, on every rank; so are the errors a user can mend."""
        answer: list[Any] = [None, None]
        if self.processes.rank == 0:
            try:
                answer[0] = action()
            except (CheckpointError, OSError) as error:
                answer[1] = error
        if self.processes.world_size > 1:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]
