"""Which configurations fit a device, and which to take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megaxelm.errors import RecipeError, TrainError
from megaxelm.model.config import DecoderConfig
from megaxelm.model.source import Lora
from megaxelm.plan.memory import MARGIN, Memory, Work, plan_memory
from megaxelm.recipe import Recipe
from megaxelm.train.ds_config import find_ds_config, micro_batch, read_ds_config
from megaxelm.train.precision import choose_precision

CONFIGS = ("zero0", "zero1", "zero2", "zero3", "long-context", "zero2-offload", "zero3-offload")
# Time of a step in comparison with ZeRO 1, by rule of thumb, to put what fits in order; `megaxelm bench train` measures it.
_TIME = {"zero0": 1.0, "zero1": 1.0, "zero2": 1.02, "zero3": 1.12, "long-context": 1.25, "zero2-offload": 1.8, "zero3-offload": 2.5}
_RECOMPUTATION = 4 / 3  # a second forward pass
_SATURATING_TOKENS = 512  # tokens of a micro-batch at which a device works at half of its speed


@dataclass(frozen=True)
class Option:
    """One way to train: configuration, micro-batch and recomputation, with its memory and whether that fits."""

    config: str
    micro_batch_size: int
    activation_checkpointing: str
    memory: Memory
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """The option with its total, for `--json`."""
        return asdict(self) | {"total": self.memory.total}


def parse_bytes(text: str, option: str) -> int:
    """`80GB`, `80GiB` or `80000MB`: bytes.

    Raises:
        TrainError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise TrainError(f"{option} {text}: give a size above 0 with its unit, for example 80GB or 75GiB")
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** (" kmgt".index(unit[0]) if unit else 0))


def options(
    recipe: Recipe, shape: DecoderConfig, world_size: int, device_bytes: int, configs: Sequence[str], lora: Lora | None = None
) -> list[Option]:
    """Every configuration x micro-batch x recomputation, quickest first by rule of thumb; `lora`: of a model trained as deltas.

    Raises:
        RecipeError: the devices cannot share a step of the recipe.
    """
    train = recipe.train
    if train.batch_sequences % world_size:
        raise RecipeError(
            f"train.batch_sequences = {train.batch_sequences} cannot be shared by {world_size} devices: choose "
            f"{max(1, round(train.batch_sequences / world_size)) * world_size}, or other devices"
        )
    share = train.batch_sequences // world_size
    sizes = sorted({micro_batch(share, 2**power) for power in range(share.bit_length())} | {micro_batch(share, train.micro_batch_size)})
    found = []
    precision = choose_precision(train.precision, cuda=True)
    for name in configs:
        config = read_ds_config(find_ds_config(name))
        for checkpointing in ("none", "full"):
            if checkpointing == "none" and "activation_checkpointing" in config:
                continue
            for size in sizes:
                every = int(checkpointing == "full")
                kernels = "torch" if train.kernels == "torch" or train.compile else "triton"
                work = Work(size, train.sequence_length, every, train.loss_chunk_rows, precision, kernels)
                memory = plan_memory(shape, config, world_size, work, cuda=True, lora=lora)
                found.append(Option(name, size, checkpointing, memory, memory.total <= device_bytes * (1 - MARGIN)))
    return sorted(found, key=lambda option: _time(option, train.sequence_length))


def _time(option: Option, sequence_length: int) -> float:
    """Time of a token in comparison with others, by rule of thumb."""
    small = 1.0 + _SATURATING_TOKENS / (option.micro_batch_size * sequence_length)
    return _TIME.get(option.config, 1.0) * small * (_RECOMPUTATION if option.activation_checkpointing == "full" else 1.0)


def choose(found: Sequence[Option]) -> Option | None:
    """The quickest that fits, by rule of thumb; None when nothing does."""
    return next((option for option in found if option.fits), None)
