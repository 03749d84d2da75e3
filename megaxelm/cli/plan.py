"""Verbs that tell speed and memory before a run: `plan` reckons them, `bench train` measures them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RecipeArgument, SetOption
from megaxelm.recipe import load_recipe

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")


def plan(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of a node that train one model.")],
    gpu_memory: Annotated[str, typer.Option(help="Memory of a device, e.g. 80GB.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train one model.")] = 1,
    speed: Annotated[float | None, typer.Option(min=1e-9, help="Tokens a second of all these devices together.")] = None,
    measured: Annotated[Path | None, typer.Option(help="Folder of a trained expert: its speed a device, from metrics.jsonl.")] = None,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Share of the device's peak, e.g. 0.4; needs --device.")] = None,
    device: Annotated[str | None, typer.Option(help="A100, H100, H100 PCIe, H200, B200, MI300X.")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of a device and hour.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Pieces of the tokenizer, where it cannot be looked at from here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    overrides: SetOption = None,
) -> None:
    """What a recipe needs before it runs: memory by part, what fits, which configuration to take, steps, time and cost."""
    import json

    from megaxelm.plan.choose import parse_bytes
    from megaxelm.plan.table import Hardware, make_plan, show_plan
    from megaxelm.plan.table import speed as find_speed
    from megaxelm.train.shape import model_shape

    loaded = load_recipe(recipe, overrides or ())
    shape = model_shape(loaded, vocab_size)
    hardware = Hardware(gpus, nodes, parse_bytes(gpu_memory, "--gpu-memory"))
    tokens_per_second, said = find_speed(shape, loaded, hardware.devices, speed, measured, mfu, device)
    made = make_plan(loaded, shape, hardware, tokens_per_second, said, price)
    print(json.dumps(made)) if as_json else show_plan(made)


@bench_app.command("train")
def bench_train(
    recipe: RecipeArgument,
    configs: Annotated[str, typer.Option(help="DeepSpeed configurations, with commas.")] = "zero1,zero2,zero3",
    micro_batches: Annotated[str | None, typer.Option(help="Sequences a forward pass, with commas. Default: the recipe's.")] = None,
    checkpointing: Annotated[str, typer.Option(help="none, full, or a number n for every n-th layer, with commas.")] = "none,full",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one that is not.")] = 5,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which a combination is given up.")] = 1800.0,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Pieces of the tokenizer, where it cannot be looked at from here.")] = None,
    overrides: SetOption = None,
) -> None:
    """Train some steps on random tokens with each combination: tokens/s, MFU, peak memory, and which to take."""
    from dataclasses import asdict

    from megaxelm.errors import TrainError
    from megaxelm.files import write_json
    from megaxelm.train import bench
    from megaxelm.train.environment import check_compiler
    from megaxelm.train.shape import model_shape

    loaded = load_recipe(recipe, overrides or ())
    parts = [part.strip() for part in (micro_batches or str(loaded.train.micro_batch_size)).split(",")]
    sizes = [int(part) if part.isdigit() else 0 for part in parts]
    chosen = bench.cases(loaded, [part.strip() for part in configs.split(",")], sizes, [part.strip() for part in checkpointing.split(",")])
    model_shape(loaded, vocab_size)
    check_compiler()
    rows = list(bench.bench(loaded, chosen, steps, vocab_size, timeout, lambda text: print(text, file=sys.stderr, flush=True)))
    print(bench.table(rows))
    best = bench.recommend(rows)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found = {"recipe": loaded.name, "steps": steps, "devices": loaded.train.num_devices, "rows": [asdict(row) for row in rows]}
        write_json(output / "bench.json", found | {"recommended": asdict(best.case) if best else None})
        bench.plot(rows, output / "bench.png", f"{loaded.name}, {loaded.train.num_devices} devices, {steps} steps")
    if best is None:
        raise TrainError("no combination gave a result; the table says why: try smaller --micro-batches, or --checkpointing full")
    print("\nthe fastest, and of those as fast the one with the least memory:\n\ntrain:")
    print(f"  deepspeed_config: {best.case.config}\n  micro_batch_size: {best.case.micro_batch_size}")
    print(f"  activation_checkpointing: {best.case.activation_checkpointing}")
