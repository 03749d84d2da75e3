"""DeepSpeed configurations: found by name, checked, and their `auto` values filled from the recipe.

DeepSpeed ignores an unknown key at the top level in silence, so the top level is checked here; its nested sections it checks itself.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

from megaxelm.errors import TrainError
from megaxelm.recipe import TrainConfig
from megaxelm.train.members import Member

_KNOWN = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "disable_allgather",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "flops_profiler",
        "fp16",
        "fp32_allreduce",
        "gradient_accumulation_dtype",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "load_universal_checkpoint",
        "memory_breakdown",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)


def find_ds_config(name: str) -> Path:
    """A file, or the name of a configuration that comes with the project (`zero2`).

    Raises:
        TrainError: neither; the names there are, are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    homes = [Path(__file__).resolve().parents[2] / "ds_configs", Path(sys.prefix) / "share" / "megaxelm" / "ds_configs"]
    for home in homes:
        if (home / f"{name}.json").is_file():
            return home / f"{name}.json"
    known = sorted({found.stem for home in homes for found in home.glob("*.json")})
    raise TrainError(f"train.deepspeed_config = {name!r}: no such file, and not one of {', '.join(known)}")


def micro_batch(rank_sequences: int, at_most: int) -> int:
    """The largest divisor of a rank's sequences a step that is not above `at_most`."""
    return next(size for size in range(min(at_most, rank_sequences), 0, -1) if rank_sequences % size == 0)


def fill_ds_config(path: Path, train: TrainConfig, member: Member, world_size: int, cuda: bool) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, every `auto` replaced.

    Raises:
        TrainError: broken JSON, an unknown key, a value that contradicts the recipe, or a batch that the ranks cannot share.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TrainError(f"{path}: not readable as JSON ({error})") from None
    for key in config:
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, sorted(_KNOWN), n=1)
            raise TrainError(f"{path}: DeepSpeed has no key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    if member.batch_sequences % world_size:
        raise TrainError(
            f"`{member.name}` has {member.batch_sequences} sequences a step, which {world_size} ranks cannot share: "
            f"use a number of ranks that divides it, or raise train.batch_sequences"
        )
    rank_sequences = member.batch_sequences // world_size
    micro = micro_batch(rank_sequences, train.micro_batch_size)
    wanted: dict[str, Any] = {
        "train_batch_size": member.batch_sequences,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rank_sequences // micro,
        "gradient_clipping": train.gradient_clipping,
        "bf16.enabled": train.precision == "bf16",
        "optimizer.params.lr": member.lr,
        "optimizer.params.betas": [train.beta1, train.beta2],
        "optimizer.params.eps": train.eps,
        "optimizer.params.weight_decay": train.weight_decay,
    }
    config.setdefault("zero_optimization", {"stage": 0})
    for dotted, value in wanted.items():
        _fill(config, dotted, value, path)
    config["optimizer"].setdefault("type", "AdamW")
    if config["optimizer"]["type"] != "AdamW":
        raise TrainError(f"{path}: optimizer.type = {config['optimizer']['type']}: AdamW is what the recipe's settings are for; write that")
    for section in ("fp16", "amp", "scheduler", "torch_autocast"):
        given = config.get(section)
        if given and not (isinstance(given, dict) and given.get("enabled") is False):
            raise TrainError(f"{path}: take out `{section}`: precision and schedule are the recipe's (train.precision, train.schedule)")
    if config["optimizer"]["params"].get("torch_adam", "auto") == "auto":
        # DeepSpeed's own CPU Adam is a compiled extension meant for offload; torch's serves a CPU run.
        config["optimizer"]["params"]["torch_adam"] = not cuda
    config.setdefault("steps_per_print", 10**9)
    left = [key for key, value in _leaves(config) if value == "auto"]
    if left:
        raise TrainError(f"{path}: `auto` cannot be filled for {', '.join(left)}: write a value")
    return config


def _fill(config: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    *parents, last = dotted.split(".")
    node = config
    for part in parents:
        node = node.setdefault(part, {})
    given = node.get(last, "auto")
    if given != "auto" and given != value:
        raise TrainError(
            f'{path}: {dotted} = {given} contradicts the recipe, which makes it {value}: write "auto" there, or change the recipe'
        )
    node[last] = value


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value)]
