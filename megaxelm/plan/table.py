"""The plan of a recipe as a whole: parameters, memory, what to take, steps, time and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megaxelm.errors import TrainError
from megaxelm.model.config import DecoderConfig, num_parameters
from megaxelm.model.lora import lora_from_recipe, lora_parameters
from megaxelm.model.source import Lora
from megaxelm.plan.choose import CONFIGS, Option, choose, options
from megaxelm.plan.memory import MARGIN, padded_parameters
from megaxelm.recipe import Recipe
from megaxelm.train.members import account, expected_members
from megaxelm.train.metrics import read_metrics
from megaxelm.train.precision import choose_precision
from megaxelm.train.throughput import PEAK_TFLOPS, attended, matmul_parameters, peak_tflops, token_flops


@dataclass(frozen=True)
class Hardware:
    """Devices that train one model: `gpus` on each of `nodes`, of `memory` bytes."""

    gpus: int
    nodes: int
    memory: int

    @property
    def devices(self) -> int:
        """All devices."""
        return self.gpus * self.nodes


def make_plan(
    recipe: Recipe, shape: DecoderConfig, hardware: Hardware, tokens_per_second: float | None, said: str, price: float | None
) -> dict[str, Any]:
    """Everything `megaxelm plan` prints, in bytes, tokens, seconds and the currency of `price` (of a device and hour).

    Args:
        tokens_per_second: of all devices together; None: no time and no cost.
        said: where that speed is from.
    """
    train = recipe.train
    lora = lora_from_recipe(recipe.experts.lora, shape) if recipe.experts.kind == "lora" else None
    all_deltas = lora is not None and recipe.seed.load is not None and not recipe.experts.dense
    found = options(recipe, shape, hardware.devices, hardware.memory, CONFIGS, lora if all_deltas else None)
    best = choose(found)
    k = recipe.clusters.num_clusters or len(recipe.corpus.languages or [])
    members = expected_members(recipe, [f"cluster-{number}" for number in range(k)]) if k else {}
    table = account(members) if members else None
    seen = attended([train.sequence_length], shape.sliding_window) / train.sequence_length
    state = 14 if choose_precision(train.precision, cuda=True) != "fp32" else 16
    plan: dict[str, Any] = {
        "parameters": num_parameters(shape),
        "padded_parameters": padded_parameters(shape),
        "matmul_parameters": matmul_parameters(shape),
        "token_flops": token_flops(shape, seen),
        "devices": hardware.devices,
        "device_bytes": hardware.memory,
        "margin_bytes": int(hardware.memory * MARGIN),
        "tokens_per_step": train.batch_sequences * train.sequence_length,
        "steps": {name: member.steps for name, member in members.items()},
        "tokens": table["total"] if table else None,
        "checkpoint_bytes": state * padded_parameters(shape),
        "options": [option.as_json() for option in found],
        "choice": best.as_json() if best else None,
        "lines": recipe_lines(best, hardware) if best else None,
    }
    if lora is not None:
        plan["deltas"] = _deltas(recipe, shape, hardware, lora, best, state)
    if tokens_per_second is not None:
        plan["speed"] = {"tokens_per_second": tokens_per_second, "from": said}
        if table:
            seconds = table["total"] / tokens_per_second
            hours = seconds / 3600 * hardware.devices
            plan["time"] = {"seconds": seconds, "device_hours": hours, "cost": None if price is None else hours * price}
    return plan


def _deltas(recipe: Recipe, shape: DecoderConfig, hardware: Hardware, lora: Lora, best: Option | None, state: int) -> dict[str, Any]:
    """What an expert of low-rank deltas takes in the configuration that is chosen for the whole models."""
    trained = lora_parameters(shape, lora)
    deltas: dict[str, Any] = {"trained_parameters": trained, "checkpoint_bytes": state * trained, "total": None}
    if best is not None:
        same = [
            option
            for option in options(recipe, shape, hardware.devices, hardware.memory, [best.config], lora)
            if option.micro_batch_size == best.micro_batch_size and option.activation_checkpointing == best.activation_checkpointing
        ]
        deltas["total"] = same[0].memory.total
    return deltas


def recipe_lines(option: Option, hardware: Hardware) -> list[str]:
    """What to write under `train:` in the recipe."""
    return [
        f"deepspeed_config: {option.config}",
        f"micro_batch_size: {option.micro_batch_size}",
        f"activation_checkpointing: {option.activation_checkpointing}",
        f"num_devices: {hardware.gpus}",
    ]


def speed(
    shape: DecoderConfig, recipe: Recipe, devices: int, stated: float | None, measured: Path | None, mfu: float | None, device: str | None
) -> tuple[float | None, str]:
    """Tokens a second of all devices, and where that is from: stated, measured by a run, or a share of the device's peak.

    Raises:
        TrainError: more than one of them, a device that is not known, or a file without figures.
    """
    given = [name for name, value in (("--speed", stated), ("--measured", measured), ("--mfu", mfu)) if value is not None]
    if len(given) > 1:
        raise TrainError(f"{' and '.join(given)} each say how fast training is: give one of them")
    if stated is not None:
        return stated, "stated"
    if measured is not None:
        path = measured / "metrics.jsonl" if measured.is_dir() else measured
        lines = read_metrics(path) if path.is_file() else []
        speeds = [line["tokens_per_second_per_device"] for line in lines if "tokens_per_second_per_device" in line]
        if not speeds:
            raise TrainError(f"--measured {measured}: no metrics.jsonl with speeds there; give the folder of a trained expert")
        return median(speeds) * devices, f"{path}, median of {len(speeds)} lines, times {devices} devices"
    if mfu is None:
        return None, "unknown"
    peak = peak_tflops(device or "", recipe.train.peak_tflops)
    if peak is None:
        raise TrainError(f"--mfu needs a device whose peak is known: --device one of {', '.join(PEAK_TFLOPS)}, or set train.peak_tflops")
    seen = attended([recipe.train.sequence_length], shape.sliding_window) / recipe.train.sequence_length
    return mfu * peak * 1e12 * devices / token_flops(shape, seen), f"{mfu:.0%} of {peak:g} TFLOP/s on {devices} devices"


def show_plan(plan: dict[str, Any]) -> None:
    """Print a plan of `make_plan` as text."""
    gb = 1e9
    print(
        f"{plan['parameters']:,} parameters, {plan['matmul_parameters']:,} of them multiplied with each token; "
        f"{plan['token_flops'] / 1e9:.3g} GFLOP a token forward and backward, attention over whole windows"
    )
    print(
        f"{plan['devices']} devices of {plan['device_bytes'] / gb:.1f} GB, of which {plan['margin_bytes'] / gb:.1f} GB are left to "
        "fragments, contexts and communication"
    )
    print(f"\nmemory of a device at its peak, GB\n{_row(_COLUMNS)}")
    for row in _shortened(plan["options"]):
        memory = row["memory"]
        parts = [f"{memory[part] / gb:.1f}" for part in _PARTS]
        host = f"{memory['host'] / gb:.1f}" if memory["host"] else ""
        total, fits = f"{row['total'] / gb:.1f}", "yes" if row["fits"] else "no"
        print(_row((row["config"], str(row["micro_batch_size"]), row["activation_checkpointing"], *parts, total, fits, host)))
    print()
    if plan["choice"] is None:
        least = min(plan["options"], key=lambda row: row["total"])
        print(
            f"nothing fits: the least is {least['total'] / gb:.1f} GB ({least['config']}, micro-batch {least['micro_batch_size']}); "
            "use more devices, larger ones, or a shorter train.sequence_length"
        )
    else:
        print("take, by rule of thumb (measure with `megaxelm bench train`):\n\ntrain:")
        print("\n".join(f"  {line}" for line in plan["lines"]) + "\n")
    print(f"{plan['tokens_per_step']:,} tokens a step; a checkpoint has {plan['checkpoint_bytes'] / gb:.1f} GB")
    if "deltas" in plan:
        deltas = plan["deltas"]
        memory = "" if deltas["total"] is None else f"; {deltas['total'] / gb:.1f} GB of a device in the configuration above"
        print(
            f"an expert trains {deltas['trained_parameters']:,} parameters of low-rank deltas "
            f"({deltas['trained_parameters'] / plan['parameters']:.2%} of the model){memory}; its checkpoint has "
            f"{deltas['checkpoint_bytes'] / gb:.3g} GB"
        )
    if plan["tokens"] is not None:
        steps = sorted(set(plan["steps"].values()) - {0})
        print(f"{plan['tokens']:,} tokens in all, {len(plan['steps'])} models, {' or '.join(f'{n:,}' for n in steps)} steps each")
    if "speed" in plan:
        print(f"{plan['speed']['tokens_per_second']:,.0f} tokens/s ({plan['speed']['from']})")
    else:
        print("time: unknown; give --speed, --measured FOLDER, or --mfu 0.4 --device H100")
    if "time" in plan:
        time = plan["time"]
        cost = "" if time["cost"] is None else f", {time['cost']:,.0f} at the stated price"
        print(f"{time['seconds'] / 3600:,.1f} hours if one model trains after the other, {time['device_hours']:,.0f} device hours{cost}")


_PARTS = ("weights", "optimizer", "gradients", "activations", "loss", "buckets", "temporary")
_COLUMNS = ("configuration", "micro", "recompute", *_PARTS, "total", "fits", "host")
_WIDTHS = (14, 6, 10, 8, 10, 10, 12, 6, 8, 10, 7, 5, 6)


def _row(cells: Sequence[str]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True)]
    return "".join([cells[0].ljust(_WIDTHS[0]), *padded]).rstrip()


def _shortened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each configuration and recomputation the largest micro-batch that fits and the next, or the smallest when none does."""
    shown = []
    order = {name: place for place, name in enumerate(CONFIGS)}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["config"], row["activation_checkpointing"]), []).append(row)
    for key in sorted(groups, key=lambda key: (order.get(key[0], 99), key[1] == "full")):
        group = sorted(groups[key], key=lambda row: row["micro_batch_size"])
        fitting = [row for row in group if row["fits"]]
        shown += fitting[-1:] + [row for row in group if not row["fits"]][:1]
    return shown
