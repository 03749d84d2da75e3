"""Measure some training steps of a recipe on tokens drawn at random: the program that `megaxelm bench train` starts on every rank.

    python -m megaxelm.train.bench_worker RECIPE --steps 5 --output result.json --set train.micro_batch_size=2

Model, engine, steps and meter are those of a training. There is no corpus: a window is one document. The first step, in which kernels
are compiled and memory is taken, is not timed. Nothing is saved.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megaxelm.console import run_guarded
from megaxelm.corpus.sampling import Windows
from megaxelm.files import write_json
from megaxelm.recipe import Recipe, load_recipe
from megaxelm.run import RunFolder
from megaxelm.train.ds_config import fill_ds_config, find_ds_config
from megaxelm.train.environment import check_compiler, find_processes
from megaxelm.train.extensions import extensions_folder
from megaxelm.train.members import Member
from megaxelm.train.precision import on_device
from megaxelm.train.shape import model_shape


class RandomWindows:
    """What the steps read in place of a corpus: windows of random tokens, one document each, by sample number."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.streams = {"": ()}

    def read(self, first: int, count: int) -> Windows:
        """Windows of samples `first` to `first + count`."""
        samples = np.arange(first, first + count)
        tokens = np.stack([np.random.default_rng(int(s)).integers(0, self.vocab_size, self.sequence_length + 1) for s in samples])
        nothing = np.empty(0, np.int64)
        return Windows(tokens, nothing, nothing, ("",) * count, samples, np.zeros(count, np.int64))


def bench_member(recipe: Recipe, steps: int) -> Member:
    """A model with the recipe's step: `train.batch_sequences` sequences."""
    train = recipe.train
    rates = {key: getattr(train, key) for key in ("lr", "final_lr_ratio", "decay_share", "language_alpha", "sequence_length")}
    return Member("bench", "dense", None, None, steps, train.batch_sequences, schedule="constant", warmup_steps=0, **rates)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megaxelm.train.bench_worker", description="Measure some training steps.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--output", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; the environment is used")
    return run_guarded(lambda: _bench(parser.parse_args(arguments)))


def _bench(options: argparse.Namespace) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    recipe = load_recipe(options.recipe, options.set)
    check_compiler()
    processes = find_processes()
    extensions_folder()

    import torch
    import torch._inductor.compile_fx  # which deepspeed.initialize imports

    import megaxelm.train.engine
    import megaxelm.train.steps  # noqa: F401 - what they import is no memory of the training
    from megaxelm.train.memory import memory
    from megaxelm.train.process_group import join_process_group
    from megaxelm.train.setting import Setting

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", processes.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    recipe = on_device(recipe, cuda)
    member = bench_member(recipe, options.steps + 1)
    ds_config = fill_ds_config(find_ds_config(recipe.train.deepspeed_config), recipe.train, member, processes.world_size, cuda)
    join_process_group(cuda)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(RunFolder(Path(scratch)), recipe, member, ds_config, processes, device)
        setting.folder.mkdir(parents=True)
        before = memory(device)
        result = measure(setting, options.vocab_size)
    if setting.is_first:
        write_json(options.output, result | {"before": before, "device_name": _device_name(device)})
    torch.distributed.destroy_process_group()


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def measure(setting: Any, vocab_size: int | None) -> dict[str, Any]:
    """Train the steps of `setting.member` and return the meter's line over all but the first. Collective."""
    from megaxelm.model.source import drawn_source
    from megaxelm.train.engine import build_model, fill_engine, start_engine
    from megaxelm.train.finite import guard
    from megaxelm.train.forward import forward_options
    from megaxelm.train.metrics import Meter
    from megaxelm.train.steps import Steps

    recipe, member = setting.recipe, setting.member
    config = model_shape(recipe, vocab_size)
    config = replace(config, residual_dropout=recipe.model.dropout, attention_dropout=recipe.model.attention_dropout)
    source = drawn_source(config, recipe.train.seed)
    model = build_model(setting, config)
    every = recipe.train.activation_checkpointing
    model.enable_activation_checkpointing(every if isinstance(every, int) else int(every == "full"))
    options = forward_options(recipe.train, config, setting.device)
    engine = start_engine(setting, model)
    fill_engine(engine, source.weight, None, 0)
    guard(engine)
    meter = Meter(config, member.sequence_length, setting.processes.world_size, setting.device, recipe.train.peak_tflops)
    blend: Any = RandomWindows(config.vocab_size, member.sequence_length)
    steps = Steps(setting, engine, blend, options, meter)
    tokens = 0
    for step in range(member.steps):
        result = steps.run(step)
        tokens += result.tokens
        if step == 0:
            meter.line({}, tokens)
            tokens = 0
    return meter.line({"loss": result.loss, "attention": options["attention"], "kernels": options["kernels"]}, tokens)


if __name__ == "__main__":
    sys.exit(main())
