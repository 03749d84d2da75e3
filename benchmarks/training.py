"""Training on one device: ours beside a bare torch loop and beside the Hugging Face Trainer with the same DeepSpeed configuration.

    python benchmarks/training.py [--turns 3] [--steps 6] [--precision bf16] [--deepspeed-config zero1] [--output FILE]
    python benchmarks/training.py --hidden-size 2048 --layers 24 --heads 16 --intermediate 5504 --vocab 32000 --length 2048 --micro-batch 4

ours     our decoder, DeepSpeed's engine, the steps and the meter of `megaxelm train`
torch    our decoder in a loop as one would write it: low-precision weights, fp32 copies in torch's AdamW, clipping
trainer  transformers' LlamaForCausalLM from our export in its Trainer, the same DeepSpeed configuration

All start from the same weights, read the same windows in the same order, and use the same learning rate; their first losses are compared
before anything is timed. Then they take turns, A B C A B C, and the figure is the median over all timed steps; the first of a turn is not
timed. On a CPU threads are those of OMP_NUM_THREADS. Prints a table, then one JSON line. Needs the package accelerate.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaxelm.corpus.packing import pack
from megaxelm.model.config import num_parameters
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.run import RunFolder
from megaxelm.train.bench_worker import RandomWindows, bench_member
from megaxelm.train.ds_config import fill_ds_config, find_ds_config
from megaxelm.train.engine import start_engine
from megaxelm.train.environment import find_processes
from megaxelm.train.extensions import extensions_folder
from megaxelm.train.forward import forward_options
from megaxelm.train.metrics import Meter
from megaxelm.train.setting import Setting
from megaxelm.train.shape import model_shape
from megaxelm.train.steps import Steps

COMPARED = 3  # steps whose losses are compared
Losses = list[float]
# Trains so many steps from a step on; returns the loss and the seconds of each.
Turn = Callable[[int, int], tuple[Losses, list[float]]]


def make_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the benchmark's model and step."""
    model = {"hidden_size": options.hidden_size, "num_layers": options.layers, "num_heads": options.heads}
    model |= {"intermediate_size": options.intermediate, "max_positions": options.length, "tie_embeddings": True}
    train = {"sequence_length": options.length, "batch_sequences": options.micro_batch * options.accumulation, "lr": 1e-3}
    train |= {"micro_batch_size": options.micro_batch, "precision": options.precision, "deepspeed_config": options.deepspeed_config}
    tree = {"name": "bench", "corpus": {"train": "-"}, "clusters": {"k": 1}, "tokenizer": {"vocab_size": options.vocab}}
    return parse_recipe(tree | {"model": model, "train": train | {"weight_decay": 0.0}})


def now(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(setting: Setting, start: Decoder, windows: RandomWindows) -> Turn:
    """Our training."""
    config = start.config
    model = Decoder(config)
    model.load_state_dict(start.state_dict())
    engine = start_engine(setting, model.train())
    meter = Meter(config, setting.member.sequence_length, 1, setting.device, None)
    blend: Any = windows
    steps = Steps(setting, engine, blend, forward_options(setting.recipe.train, config, setting.device), meter)

    def turn(first: int, count: int) -> tuple[Losses, list[float]]:
        losses, seconds = [], []
        for step in range(first, first + count):
            began = now(setting.device)
            result = steps.run(step)
            losses.append(result.loss)
            seconds.append(now(setting.device) - began)
        return losses, seconds

    return turn


def bare_torch(setting: Setting, start: Decoder, windows: RandomWindows) -> Turn:
    """The same model in a plain loop, with fp32 copies of low-precision weights."""
    train, device = setting.recipe.train, setting.device
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    model = Decoder(start.config)
    model.load_state_dict(start.state_dict())
    model.to(device, dtype).train()
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=0.0, fused=device.type == "cuda" or None
    )
    options = forward_options(train, start.config, device)
    micro, batch = setting.ds_config["train_micro_batch_size_per_gpu"], setting.member.batch_sequences

    def one(step: int) -> float:
        targets, total = batch * train.sequence_length, 0.0
        for at in range(step * batch, (step + 1) * batch, micro):
            packed = pack(windows.read(at, micro), True).to(device)
            output = model(packed.tokens, packed.positions, packed.cu_seqlens, labels=packed.labels, **options)
            (output.loss_sum / targets).backward()
            total += float(output.loss_sum.detach())
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        return total / targets

    def turn(first: int, count: int) -> tuple[Losses, list[float]]:
        losses, seconds = [], []
        for step in range(first, first + count):
            began = now(device)
            losses.append(one(step))
            seconds.append(now(device) - began)
        return losses, seconds

    return turn


def trainer(setting: Setting, export: Path, windows: RandomWindows) -> Turn:
    """The Hugging Face Trainer. Each turn is a training of its own from the start, of which the steps are timed."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    train, device, batch = setting.recipe.train, setting.device, setting.member.batch_sequences

    class Dataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, first: int, count: int) -> None:
            self.first, self.count = first, count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            tokens = torch.from_numpy(windows.read(self.first + number, 1).tokens[0])
            return {"input_ids": tokens[:-1], "labels": tokens[:-1], "shift_labels": tokens[1:]}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: Losses = []
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = self.began or now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end = now(device)
            self.seconds.append(end - self.began)
            self.began = end  # what the Trainer does between two steps is part of its time, and so is reading

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    class Sequential(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:  # type: ignore[type-arg]
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def turn(first: int, count: int) -> tuple[Losses, list[float]]:
        clock = Clock()
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(export, dtype=dtype, attn_implementation="sdpa")
        model.config.use_cache = False
        arguments = TrainingArguments(
            output_dir=str(export / "trainer"),
            deepspeed=json.loads(json.dumps(setting.ds_config)),
            max_steps=count,
            per_device_train_batch_size=setting.ds_config["train_micro_batch_size_per_gpu"],
            gradient_accumulation_steps=setting.ds_config["gradient_accumulation_steps"],
            learning_rate=train.lr,
            lr_scheduler_type="constant",
            adam_beta1=train.beta1,
            adam_beta2=train.beta2,
            adam_epsilon=train.eps,
            weight_decay=0.0,
            max_grad_norm=train.gradient_clipping,
            bf16=train.precision == "bf16",
            use_cpu=device.type == "cpu",
            logging_steps=1 if first == 0 else 10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
        )
        Sequential(model, arguments, train_dataset=Dataset(first * batch, count * batch), callbacks=[clock]).train()
        return clock.losses, clock.seconds

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    cuda = torch.cuda.is_available()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--deepspeed-config", default="zero1")
    sizes = {"hidden-size": (256, 2048), "layers": (6, 24), "heads": (4, 16), "intermediate": (688, 5504), "vocab": (8192, 32000)}
    sizes |= {"length": (256, 2048), "micro-batch": (8, 4), "accumulation": (1, 4)}
    for name, (small, large) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=large if cuda else small)
    parser.add_argument("--only", help="of ours, torch, trainer, with commas")
    parser.add_argument("--output", type=Path, help="file to which the JSON line is added")
    options = parser.parse_args()

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes = find_processes()
    extensions_folder()
    import deepspeed

    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    recipe = make_recipe(options)
    member = bench_member(recipe, 10**6)
    ds_config = fill_ds_config(find_ds_config(options.deepspeed_config), recipe.train, member, 1, cuda)
    windows = RandomWindows(options.vocab, options.length)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(RunFolder(Path(folder)), recipe, member, ds_config, processes, device)
        setting.folder.mkdir(parents=True)
        start = Decoder(model_shape(recipe))
        start.initialise(0)
        export = Path(folder) / "export"
        save_pretrained(start, export)
        made: dict[str, Callable[[], Turn]] = {
            "ours": lambda: ours(setting, start, windows),
            "torch": lambda: bare_torch(setting, start, windows),
            "trainer": lambda: trainer(setting, export, windows),
        }
        chosen = options.only.split(",") if options.only else list(made)
        turns = {name: made[name]() for name in chosen}
        losses = {name: turn(0, COMPARED)[0] for name, turn in turns.items()}
        compare(losses, options.precision)
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(options.turns):
            for name, turn in turns.items():
                seconds[name] += turn(COMPARED + number * (options.steps + 1), options.steps + 1)[1][1:]
    tokens = member.batch_sequences * member.sequence_length
    report(seconds, tokens, losses, num_parameters(start.config), options, device)
    torch.distributed.destroy_process_group()


def compare(losses: dict[str, Losses], precision: str) -> None:
    """The first losses must be one curve, or the times mean nothing."""
    bound = 2e-3 if precision == "bf16" else 1e-5
    first = next(iter(losses.values()))
    for name, values in losses.items():
        print(f"{name:<8} first losses {', '.join(f'{value:.5f}' for value in values)}")
        worst = max(abs(a - b) / abs(b) for a, b in zip(values, first, strict=True))
        if worst > bound:
            raise SystemExit(f"{name}: its losses differ from the others' by {worst:.1e}, more than {bound:.0e}: not the same training")


def report(
    seconds: dict[str, list[float]],
    tokens: int,
    losses: dict[str, Losses],
    parameters: int,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Print the table and the JSON line."""
    rows = {}
    print(f"\n{'':<8}{'ms a step':>11}{'p10':>9}{'p90':>9}{'tokens/s':>11}")
    for name, values in seconds.items():
        low, high = np.percentile(values, [10, 90])
        middle = statistics.median(values)
        rows[name] = {"ms": middle * 1e3, "p10_ms": low * 1e3, "p90_ms": high * 1e3, "tokens_per_second": tokens / middle}
        print(f"{name:<8}{middle * 1e3:>11.1f}{low * 1e3:>9.1f}{high * 1e3:>9.1f}{tokens / middle:>11,.0f}")
    if "ours" in rows:
        for name in rows.keys() - {"ours"}:
            print(f"ours / {name}: {rows['ours']['tokens_per_second'] / rows[name]['tokens_per_second']:.3f} of its tokens/s")
    line = {
        "benchmark": "training",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "parameters": parameters,
        "tokens_a_step": tokens,
        **{key: getattr(options, key) for key in ("precision", "deepspeed_config", "turns", "steps")},
        "losses": losses,
        "rows": rows,
    }
    print(json.dumps(line))
    if options.output:
        with open(options.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
