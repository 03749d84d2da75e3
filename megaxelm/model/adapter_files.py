"""Low-rank deltas on disk, in the format of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors.

`base_model_name_or_path` is the way to the base's checkpoint folder from the adapter's own, so a run moves as one folder. peft itself
takes the base as a model: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.files import write_json
from megaxelm.model.config import DecoderConfig
from megaxelm.model.families import get_family, hf_name
from megaxelm.model.lora import adapted_source, lora_shapes, projections, refuse_other_tensors
from megaxelm.model.source import Lora, WeightSource
from megaxelm.model.weight_files import read_json, safetensors_of, write_weight_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What peft can ask for beyond plain deltas, with the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, []),
    "lora_bias": (False, None),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds deltas and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(folder: Path) -> str | Path:
    """The base of an adapter: a folder, or a name on the Hugging Face hub.

    Raises:
        ModelError: the adapter names none, or a folder that is not there.
    """
    path = folder / CONFIG
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path}: base_model_name_or_path = {name!r}: it must name the folder of the base; write it there")
    near = Path(os.path.normpath(folder / name))
    if near.is_dir():
        return near
    if name.startswith((".", "/")):
        raise ModelError(f"{path}: base_model_name_or_path = {name}: no such folder; an adapter moves together with its base")
    return name


def open_adapter(folder: Path, open_base: Callable[[str | Path], WeightSource]) -> WeightSource:
    """The tensors of an adapter with its base, merged as they are asked for; `source.adapter` has them apart.

    Raises:
        ModelError: the folder or its base is incomplete or damaged, or asks for something else than plain deltas.
    """
    raw = read_json(folder / CONFIG)
    for field, plain in _PLAIN.items():
        if raw.get(field, plain[0]) not in plain:
            raise ModelError(
                f"{folder / CONFIG}: {field} = {raw[field]!r} is not supported, only {plain[0]!r}; merge the adapter with peft"
            )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ModelError(f"{folder / CONFIG}: r = {rank!r}, lora_alpha = {alpha!r}: expected numbers; copy the adapter again")
    where = base_folder(folder)
    base = open_base(where)
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: {WEIGHTS} is missing; copy the adapter again")
    stored = safetensors_of(folder / WEIGHTS)
    present = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in stored}
    targets = tuple(ours for ours, theirs in projections(base.config).items() if theirs in present)
    lora = Lora(rank, float(alpha), targets, float(raw.get("lora_dropout") or 0.0))
    shapes = lora_shapes(base.config, lora)
    names = {ours: peft_name(base.config, ours) for ours in shapes}
    found = {name: tensor.shape for name, tensor in stored.items()}
    refuse_other_tensors(str(folder), found, {names[ours]: shape for ours, shape in shapes.items()})
    return adapted_source(base, lora, lambda name: stored[names[name]].read(), Path(where))


def peft_name(config: DecoderConfig, name: str) -> str:
    """peft's name of one of our matrices: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    module, kind, _ = name.rsplit(".", 2)
    theirs = hf_name(get_family(config.family), f"{module}.weight").removesuffix(".weight")
    return f"{_PREFIX}{theirs}.{kind}.weight"


def save_adapter(source: WeightSource, folder: Path, dtype: torch.dtype, tokenizer_folder: Path | None = None) -> None:
    """Write the deltas of `source` as an adapter folder that peft loads.

    Raises:
        ModelError: values that are not finite, or no tokenizer files.
    """
    from megaxelm.model.hub import copy_tokenizer

    adapter = source.adapter
    assert adapter is not None
    config, lora = source.config, adapter.lora
    folder.mkdir(parents=True, exist_ok=True)
    ours = {peft_name(config, name): name for name in lora_shapes(config, lora)}

    def read(theirs: str) -> Tensor:
        tensor = adapter.tensor(ours[theirs])
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"export: {ours[theirs]} has values that are not finite: training has diverged; go back to an earlier checkpoint"
            )
        return tensor

    shapes = lora_shapes(config, lora)
    write_weight_file(folder / WEIGHTS, {theirs: shapes[name] for theirs, name in ours.items()}, dtype, read)
    known = projections(config)
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": os.path.relpath(adapter.folder, folder),
            "r": lora.rank,
            "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": [known[target] for target in lora.targets],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        },
    )
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)


def write_adapter(source: WeightSource, target: Path, dtype: str, tokenizer_folder: Path, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Write `target` as an adapter folder; what lies there is replaced once the reloaded logits agree on `texts_tokens`.

    Raises:
        ModelError: an unknown dtype, or logits that do not agree.
    """
    from megaxelm.model.export import find_dtype
    from megaxelm.model.hub import compare_logits

    source = replace(source, config=replace(source.config, residual_dropout=0.0, attention_dropout=0.0))
    aside = target.with_name(f".{target.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_adapter(source, aside, find_dtype(dtype), tokenizer_folder)
        compare_logits(aside, source, texts_tokens, find_dtype(dtype))
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rebase(folder: Path, base: Path) -> None:
    """Let the adapter in `folder` name `base`, a folder that moves together with it."""
    write_json(folder / CONFIG, read_json(folder / CONFIG) | {"base_model_name_or_path": os.path.relpath(base, folder)})
