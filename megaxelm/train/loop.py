"""Train one model with DeepSpeed: build, resume, step, save, export."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megaxelm.corpus.index_folder import load_index_manifest, open_streams
from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import Preempted, TrainError
from megaxelm.files import write_json
from megaxelm.model.decoder import Decoder
from megaxelm.model.lora import lora_parameters
from megaxelm.train.checkpoint import Checkpoints, Layout, Progress
from megaxelm.train.ds_config import offloads
from megaxelm.train.engine import build_model, fill_engine, fill_frozen, start_engine, starting_weights
from megaxelm.train.evaluation import HeldOut
from megaxelm.train.export import export_trained
from megaxelm.train.finite import guard
from megaxelm.train.forward import forward_options
from megaxelm.train.members import Member, check_language_weights
from megaxelm.train.memory import memory
from megaxelm.train.metrics import Meter, Metrics, console_line
from megaxelm.train.preemption import StopRequest
from megaxelm.train.profile import Profile
from megaxelm.train.setting import Setting
from megaxelm.train.staging import find_index
from megaxelm.train.steps import StepResult, Steps
from megaxelm.train.ulysses import Exchange, check_sequence_parallel, sequence_group
from megaxelm.train.watchdog import Watchdog


def train(
    setting: Setting,
    progress_bar: Callable[[Member, int], Iterable[int]],
    make_steps: Callable[..., Steps] = Steps,
    prepare: Callable[[Decoder], None] | None = None,
) -> None:
    """Train to the last step, resuming from the newest complete checkpoint, and export. Runs on every rank.

    Args:
        progress_bar: steps from the given one on, with a bar; used on rank 0.
        make_steps: makes the steps, with the arguments of `Steps`; another loss is a class of its own.
        prepare: called with the model before the engine is made around it.
    """
    recipe, member = setting.recipe, setting.member
    config = recipe.train
    tokenizer = Tokenizer.load(setting.run.folder("tokenizer"))
    index = find_index(setting.run)
    streams = open_streams(index, member.clusters, tokenizer)
    check_language_weights(recipe, {language for languages in load_index_manifest(index)["clusters"].values() for language in languages})
    sample_seed = member.sample_seed(config.seed)
    blend = Blend(streams, member.sequence_length, member.language_alpha, sample_seed, config.language_weights)
    before = memory(setting.device)
    source = starting_weights(setting, tokenizer)
    model = build_model(setting, source.config, None if source.adapter is None else source.adapter.lora)
    options = forward_options(config, model.config, setting.device)
    every = config.activation_checkpointing
    model.enable_activation_checkpointing(every if isinstance(every, int) else int(every == "full"))
    check_sequence_parallel(config.sequence_parallel, setting.processes.world_size, model.config, member.sequence_length)
    if config.compile and setting.ds_config["zero_optimization"]["stage"] == 3:
        raise TrainError(
            "train.compile = true with ZeRO stage 3, which gathers weights inside of what would be compiled: choose a lower stage"
        )
    if config.compile:
        for layer in model.layers:
            layer.compile()
    if prepare is not None:
        prepare(model)
    held_out = HeldOut(setting, blend.streams, tokenizer, options) if config.evaluate_every else None
    engine = start_engine(setting, model, source.adapter)
    guard(engine)
    shared = dict(options)
    if config.sequence_parallel > 1:
        shared["exchange"] = Exchange(sequence_group(setting.processes, config.sequence_parallel))
    checkpoints = _checkpoints(setting, partial=source.adapter is not None)
    if source.adapter is not None:
        fill_frozen(engine, source.part)  # checkpoints hold what is trained
    start = checkpoints.resume(engine)
    if start.step == 0:
        fill_engine(engine, source.part, None, 0)
    if setting.is_first:
        _record_choices(setting, model, options, start, before)
    metrics = Metrics(setting.folder, start.step, engine.monitor) if setting.is_first else None
    bar = progress_bar(member, start.step) if setting.is_first else range(start.step, member.steps)
    stop = StopRequest(setting.folder, setting.processes.rank, setting.processes.world_size)
    with Watchdog(config.hang_seconds) as watchdog:
        deltas = 0 if source.adapter is None else lora_parameters(model.config, source.adapter.lora)
        meter = Meter(model.config, member.sequence_length, setting.processes.world_size, setting.device, config.peak_tflops, deltas)
        loop = Loop(setting, make_steps(setting, engine, blend, shared, meter), checkpoints, metrics, start.step)
        with Profile(setting.folder / "profile", setting.profile, setting.processes.rank) as profile:
            loop.run(bar, stop, watchdog, held_out, profile)
    checkpoints.finish()
    export_trained(setting, tokenizer)
    if metrics is not None:
        metrics.close()


class _StopNow(Exception):
    """All ranks have agreed to stop."""


class Loop:
    """Steps from one on to the last: what is logged, evaluated and saved in between, and how it ends early.

    `done` is the number of steps whose update is in the weights (or was skipped).
    """

    def __init__(self, setting: Setting, steps: Steps, checkpoints: Checkpoints, metrics: Metrics | None, start: int) -> None:
        self.setting = setting
        self.steps = steps
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.done = self.saved = start
        self.skipped_in_a_row = 0
        self._told_saving = False
        self._window = _Window(len(steps.languages), setting)

    def run(
        self,
        bar: Iterable[int],
        stop: StopRequest | None = None,
        watchdog: Watchdog | None = None,
        held_out: HeldOut | None = None,
        profile: Profile | None = None,
    ) -> None:
        """Train for the steps of `bar`. Collective.

        Raises:
            Preempted: it was asked to stop, and the state is saved.
            TrainError: too many steps in a row were not finite.
        """

        def watch() -> None:
            if watchdog is not None:
                watchdog.beat()
            if stop is not None and stop.agree():
                raise _StopNow

        self.steps.watch = watch
        try:
            for step in bar:
                with contextlib.nullcontext() if profile is None else profile.step(step + 1):
                    self._step(step, watch, held_out)
                watch()
        except _StopNow:
            assert stop is not None
            if self.done < self.setting.member.steps:
                raise self._stopped(stop) from None
            if self.saved != self.done:
                self._save()  # all steps are done: what is left is the export
        skipped = self.steps.engine.skipped_steps
        if skipped and self.setting.is_first:
            print(f"`{self.setting.member.name}`: {skipped} of {self.done} steps were skipped: their gradient was not finite", flush=True)

    def _step(self, step: int, watch: Callable[[], None], held_out: HeldOut | None) -> None:
        member, config = self.setting.member, self.setting.recipe.train
        result = self.steps.run(step)
        self.done = step + 1
        self._window.add(result)
        self._look_at(result, step)
        last = self.done == member.steps
        scores: dict[str, float] = {}
        if held_out is not None and config.evaluate_every and (last or self.done % config.evaluate_every == 0):
            try:
                scores = held_out.score(self.steps.engine, watch)
            except _StopNow:
                self._log(result, scores)
                raise
        # Before it is saved: a resumed training writes no line of the steps that are in its checkpoint.
        if last or scores or self.done % config.log_every == 0:
            self._log(result, scores)
        if last or (self.done % config.checkpoint_every == 0 and not self.skipped_in_a_row):
            # Not after a step that was skipped: what made it so may be in the weights, and older checkpoints make room for new ones.
            self._save()

    def _look_at(self, result: StepResult, step: int) -> None:
        """Count a step that was skipped; after too many in a row it is no accident."""
        if result.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        name, most = self.setting.member.name, self.setting.recipe.train.max_skipped_steps
        samples = self.steps.samples(step)
        where = f"step {step + 1}, samples {samples[0]} to {samples[-1]}"
        if self.setting.is_first:
            print(f"`{name}`: {where}: the gradient is not finite; the step is skipped", flush=True)
        if self.skipped_in_a_row >= most:
            raise TrainError(
                f"`{name}`: {most} steps in a row had a gradient that is not finite, the last {where}; training stops, and checkpoints "
                "before them stay. Lower train.lr, raise train.warmup_steps, set train.precision = fp32, or look at those samples; "
                "train.max_skipped_steps is how many are skipped"
            )

    def _log(self, result: StepResult, scores: dict[str, float]) -> None:
        member = self.setting.member
        tokens = self._window.tokens
        line: dict[str, Any] = {"step": self.done} | self._window.close(self.steps.languages) | {"lr": result.lr}
        line |= {} if result.grad_norm is None else {"grad_norm": result.grad_norm}
        line |= {"skipped_steps": self.steps.engine.skipped_steps, "tokens": self.done * member.batch_sequences * member.sequence_length}
        line |= {"language_tokens": language_tokens(self.steps.blend, self.done * member.batch_sequences)}
        line |= {"evaluation_bits_per_byte": scores} if scores else {}
        meter = self.steps.meter
        line = line if meter is None else meter.line(line, tokens)
        if self.metrics is not None:
            self.metrics.write(line)
            if meter is not None and not sys.stderr.isatty():
                print(console_line(member.name, member.steps, line), flush=True)

    def _save(self) -> float:
        seconds = self.checkpoints.save(self.steps.engine, Progress(self.done, self.done * self.setting.member.batch_sequences))
        self.saved = self.done
        grace = self.setting.recipe.train.grace_seconds
        told, self._told_saving = self._told_saving, True
        if self.setting.is_first and (not told or seconds > grace):
            warning = ": too slow to save after a signal, which loses the steps since the last checkpoint" if seconds > grace else ""
            print(f"checkpoint of step {self.done} saved in {seconds:.1f} s; after a signal there are {grace:g} s{warning}", flush=True)
        return seconds

    def _stopped(self, stop: StopRequest) -> Preempted:
        """Save where it stands."""
        began = time.monotonic()
        if self.saved != self.done:
            self._save()
        self.checkpoints.finish()
        seconds = time.monotonic() - began
        stop.obeyed()
        grace = self.setting.recipe.train.grace_seconds
        return Preempted(
            f"`{self.setting.member.name}` was stopped by {stop.agreed} after step {self.done} of {self.setting.member.steps}; saved in "
            f"{seconds:.1f} s of {grace:g} s; the same command goes on from there"
        )


class _Window:
    """Sums over the steps since the last line of the log."""

    def __init__(self, languages: int, setting: Setting) -> None:
        self._setting = setting
        self._by_language = torch.zeros(languages, 2, dtype=torch.float64)
        self.tokens = 0

    def add(self, result: StepResult) -> None:
        """A step; the loss of a skipped one is no number and not counted."""
        self.tokens += result.tokens
        if result.applied:
            self._by_language += result.by_language.cpu()

    def close(self, languages: Sequence[str]) -> dict[str, Any]:
        """The means over all ranks, and a new window. Collective.

        Returns:
            loss (nats a predicted token; None where all steps were skipped) and loss_by_language.
        """
        sums = self._by_language.to(self._setting.device)
        if self._setting.processes.world_size > 1:
            dist.all_reduce(sums)
        table = sums.cpu().numpy()
        found = {
            "loss": float(table[:, 0].sum() / table[:, 1].sum()) if table[:, 1].sum() else None,
            "loss_by_language": {name: float(row[0] / row[1]) for name, row in zip(languages, table, strict=True) if row[1]},
        }
        self._by_language.zero_()
        self.tokens = 0
        return found


def _checkpoints(setting: Setting, partial: bool) -> Checkpoints:
    config, stage = setting.recipe.train, setting.ds_config["zero_optimization"]["stage"]
    return Checkpoints(
        setting.folder / "checkpoints",
        Layout(setting.processes.world_size, stage, config.precision, offloads(setting.ds_config, "offload_optimizer")),
        setting.processes,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
        asynchronous=config.async_checkpoints,
        partial=partial,
    )


def language_tokens(blend: Blend, samples: int) -> dict[str, int]:
    """Tokens of each language among the first `samples` samples of a run: by arithmetic, so the same after a resume and on any ranks."""
    return {language: count * blend.sequence_length for language, count in sorted(blend.counts(samples).items())}


def _record_choices(setting: Setting, model: Decoder, options: dict[str, Any], start: Progress, before: dict[str, int]) -> None:
    """What was chosen, once, on the console and with the run."""
    config, processes, member = setting.recipe.train, setting.processes, setting.member
    choices = {
        "processes": processes.world_size,
        "started_by": processes.found,
        "device": str(setting.device),
        "precision": config.precision,
        "zero_stage": setting.ds_config["zero_optimization"]["stage"],
        "attention": options["attention"],
        "kernels": options["kernels"],
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile,
        "sequence_parallel": config.sequence_parallel,
        "loss": "chunks of a memory budget" if config.loss_chunk_rows is None else f"chunks of {config.loss_chunk_rows} rows",
        "micro_batch_size": setting.ds_config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": setting.ds_config["gradient_accumulation_steps"],
        "parameters": _count(model.parameters()),
        "trained_parameters": _count(parameter for parameter in model.parameters() if parameter.requires_grad),
        "resumed_from_step": start.step,
        "resident_at_start": before.get("resident", 0),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(setting.folder / "choices.json", choices | {"deepspeed_config": setting.ds_config})
    print(f"{member.name}: " + ", ".join(f"{key} {value}" for key, value in choices.items()), flush=True)


def _count(parameters: Iterable[Any]) -> int:
    """Numbers in some parameters; under ZeRO-3 one that is divided is empty itself."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)
