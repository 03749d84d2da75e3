"""DeepSpeed configurations: found by name, checked, compared with the recipe, and their `auto` values filled from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megaxelm.errors import TrainError
from megaxelm.recipe import TrainConfig
from megaxelm.train.ds_keys import UNUSED, check_keys
from megaxelm.train.members import Member
from megaxelm.train.precision import choose_precision


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


def read_ds_config(path: Path) -> dict[str, Any]:
    """A configuration as it is in its file, every key and type checked.

    Raises:
        TrainError: broken JSON, or a key or value that DeepSpeed does not have.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise TrainError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise TrainError(f"{path}: a DeepSpeed configuration is an object of keys and values, {{...}}")
    check_keys(config, path)
    return config


def check_ds_config(path: Path, train: TrainConfig) -> dict[str, Any]:
    """What can be said of a configuration before a model, a device and a number of ranks are known.

    Returns:
        The configuration with everything filled but the batch sizes and the learning rate, and the precision where that is `auto`.

    Raises:
        TrainError: a wrong key or value, or one that contradicts the recipe.
    """
    config = read_ds_config(path)
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    wanted: dict[str, Any] = {
        "gradient_clipping": train.gradient_clipping,
        "optimizer.type": "AdamW",
        "optimizer.params.betas": [train.beta1, train.beta2],
        "optimizer.params.eps": train.eps,
        "optimizer.params.weight_decay": train.weight_decay,
    }
    if train.precision != "auto":  # which a device settles
        wanted |= {"bf16.enabled": train.precision == "bf16", "fp16.enabled": train.precision == "fp16"}
    for dotted, value in wanted.items():
        _fill(config, dotted, value, path)
    _refuse_unused(config, path)
    _check_engine(config, path)
    _check_offload(config["zero_optimization"], path)
    _check_activation_checkpointing(config, train, path)
    return config


def fill_ds_config(path: Path, train: TrainConfig, member: Member, world_size: int, cuda: bool) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, every `auto` replaced.

    Raises:
        TrainError: as `check_ds_config`; a batch that the ranks cannot share; a precision that the device does not have.
    """
    train = train.model_copy(update={"precision": choose_precision(train.precision, cuda)})
    config = check_ds_config(path, train)
    shared = train.sequence_parallel
    if world_size % shared:
        raise TrainError(f"train.sequence_parallel = {shared}: {world_size} ranks cannot be divided into groups of it; choose a divisor")
    data_ranks = world_size // shared
    if member.batch_sequences % data_ranks:
        groups = f"{data_ranks} ranks" if shared == 1 else f"{data_ranks} groups of {shared} ranks"
        raise TrainError(
            f"`{member.name}` has {member.batch_sequences} sequences a step, which {groups} cannot share: "
            f"use a number of ranks that divides it, or raise train.batch_sequences"
        )
    rank_sequences = member.batch_sequences // data_ranks
    micro = micro_batch(rank_sequences, train.micro_batch_size)
    wanted = {
        "train_batch_size": member.batch_sequences,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rank_sequences // micro,
        "optimizer.params.lr": member.lr,
    }
    for dotted, value in wanted.items():
        _fill(config, dotted, value, path)
    # DeepSpeed counts every rank as one with data of its own.
    config["train_batch_size"] = member.batch_sequences * shared
    params = config["optimizer"]["params"]
    if params.get("torch_adam", "auto") == "auto":
        # DeepSpeed's own CPU Adam is a compiled extension, which offload needs; torch's serves any other run on a CPU.
        params["torch_adam"] = not cuda and not offloads(config, "offload_optimizer")
    config.setdefault("steps_per_print", 10**9)
    left = [key for key, value in _leaves(config) if value == "auto"]
    if left:
        raise TrainError(f"{path}: `auto` cannot be filled for {', '.join(left)}: write a value")
    return config


def offloads(config: dict[str, Any], what: str) -> bool:
    """Whether `zero_optimization.<what>` (`offload_optimizer` or `offload_param`) moves anything."""
    section = config["zero_optimization"].get(what)
    return section is not None and section.get("device", "none") != "none"


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key `{twice[0]}` occurs twice in one section; keep one")
    return dict(pairs)


def _refuse_unused(config: dict[str, Any], path: Path) -> None:
    for section, why in UNUSED.items():
        given = config.get(section)
        if given and not (isinstance(given, dict) and given.get("enabled") is False):
            raise TrainError(f"{path}: take out `{section}`: {why}")


def _check_engine(config: dict[str, Any], path: Path) -> None:
    """Switches of the engine that would change what the recipe's steps mean."""
    rules = {
        "gradient_allreduce_op": ("mean", "the loss is scaled for the mean over the ranks"),
        "managed_gradient_accumulation": (True, "micro-batches are counted by the engine"),
        "zero_optimization.compute_grad_norm": (True, "the trainer looks at the norm of the gradient"),
        "optimizer.params.adam_w_mode": (True, "train.weight_decay is decoupled, as in AdamW"),
    }
    for dotted, (only, why) in rules.items():
        node: Any = config
        for part in dotted.split("."):
            node = node.get(part, only) if isinstance(node, dict) else only
        if node not in (only, "auto"):
            raise TrainError(f"{path}: {dotted} = {node} does not fit: {why}; write {json.dumps(only)}, or take it out")
    params = config["optimizer"]["params"]
    if params.get("foreach") is not None and params.get("torch_adam") is not True:
        raise TrainError(f'{path}: optimizer.params.foreach belongs to torch\'s AdamW: write "torch_adam": true beside it, or take it out')


def _check_offload(zero: dict[str, Any], path: Path) -> None:
    for what, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if zero.get(what) is not None and zero["stage"] not in stages:
            raise TrainError(
                f"{path}: zero_optimization.{what} with stage = {zero['stage']} would be ignored: it needs stage "
                f"{' or '.join(map(str, stages))}"
            )


def _check_activation_checkpointing(config: dict[str, Any], train: TrainConfig, path: Path) -> None:
    """The decoder recomputes its layers itself, as the recipe says; the section of DeepSpeed may only agree with that."""
    section = config.get("activation_checkpointing")
    if section is None:
        return
    for key, value in section.items():
        if value not in (False, None, "auto"):
            raise TrainError(
                f"{path}: activation_checkpointing.{key} = {value} would have no effect: layers are recomputed by the decoder, as "
                "train.activation_checkpointing says; write false, or take it out"
            )
    config["activation_checkpointing"] = {key: None if key == "number_checkpoints" else False for key in section}
    if train.activation_checkpointing == "none":
        raise TrainError(
            f"{path}: it has a section `activation_checkpointing`, and the recipe says train.activation_checkpointing = none: set it to "
            "full or a number, or take the section out"
        )


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
