"""Memory and speed of a large model under each ZeRO configuration, beside what `megaxelm plan` says of it.

    python benchmarks/zero.py [--recipe FILE] [--configs zero1,zero2] [--micro-batches 8] [--checkpointing full] [--steps 4] [--output FILE]

Random weights and random tokens on `train.num_devices` devices, each configuration in its own processes. The peak is that of the fullest
device: reserved memory on CUDA; on a CPU resident memory, with what was imported. Prints a table, then one JSON line, which --output also
appends to a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from megaxelm.plan.memory import Work, plan_memory
from megaxelm.recipe import load_recipe
from megaxelm.train import bench
from megaxelm.train.ds_config import find_ds_config, read_ds_config
from megaxelm.train.precision import choose_precision
from megaxelm.train.shape import model_shape
from megaxelm_kernels.backend import choose_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=str(Path(__file__).parent / "xglm-1.7b-random.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe")
    parser.add_argument("--configs", default="zero1,zero2,zero3,zero2-offload,zero3-offload")
    parser.add_argument("--micro-batches", default="8")
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a configuration is given up")
    parser.add_argument("--output")
    options = parser.parse_args()

    recipe = load_recipe(options.recipe, options.set)
    shape, cuda = model_shape(recipe), torch.cuda.is_available()
    sizes = [int(size) for size in options.micro_batches.split(",")]
    chosen = bench.cases(recipe, options.configs.split(","), sizes, options.checkpointing.split(","))
    rows = list(bench.bench(recipe, chosen, options.steps, None, options.timeout, lambda text: print(text, file=sys.stderr, flush=True)))
    print(bench.table(rows))
    found = []
    for row in rows:
        kind = row.case.activation_checkpointing
        every = {"none": 0, "full": 1}.get(kind) if not kind.isdigit() else int(kind)
        train = recipe.train
        kernels = choose_kernels(train.kernels, "cuda" if cuda else "cpu")
        precision = choose_precision(train.precision, cuda)
        work = Work(row.case.micro_batch_size, train.sequence_length, every or 0, train.loss_chunk_rows, precision, kernels)
        plan = plan_memory(shape, read_ds_config(find_ds_config(row.case.config)), recipe.train.num_devices, work, cuda).total
        found.append(asdict(row) | {"planned_memory": plan})
        if row.peak_memory:
            print(f"{row.case.config:<16} planned {plan / 1e9:.2f} GB, measured {row.peak_memory / 1e9:.2f} GB")
    line = {"benchmark": "zero", "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__}
    line |= {"recipe": recipe.name, "devices": recipe.train.num_devices, "steps": options.steps, "rows": found}
    if options.output:
        with open(options.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
