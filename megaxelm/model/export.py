"""Hugging Face checkpoints that are reloaded and compared before they take their place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megaxelm.errors import ModelError
from megaxelm.model.adapter_files import write_adapter
from megaxelm.model.hub import check_export, open_pretrained, save_pretrained
from megaxelm.model.memory import large_blocks_apart
from megaxelm.model.source import WeightSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_dtype(name: str) -> torch.dtype:
    """The type of exported weights.

    Raises:
        ModelError: a name that is none.
    """
    if name not in DTYPES:
        raise ModelError(f"dtype = {name}: choose {' or '.join(DTYPES)}")
    return DTYPES[name]


def write_export(source: WeightSource, target: Path, dtype: str, tokenizer_folder: Path, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Write `target` with its tokenizer; what lies there is replaced once the reloaded logits agree on `texts_tokens`.

    Raises:
        ModelError: an unknown dtype, or logits that do not agree.
    """
    stored = find_dtype(dtype)
    source = replace(source, config=replace(source.config, residual_dropout=0.0, attention_dropout=0.0))
    aside = target.with_name(f".{target.name}.making")
    if aside.exists():
        shutil.rmtree(aside)
    try:
        with large_blocks_apart():
            save_pretrained(source, aside, dtype=stored, tokenizer_folder=tokenizer_folder)
            check_export(aside, source, texts_tokens)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_to(
    source: WeightSource, output: Path, dtype: str, tokenizer_folder: Path, texts_tokens: Sequence[Sequence[int]], to: str = "hf"
) -> None:
    """Write a checkpoint into a folder that a user named.

    Args:
        to: `hf`, a checkpoint with deltas merged into its weights, or `adapter`, the deltas alone in peft's format.

    Raises:
        ModelError: `output` exists already, an adapter of a model without deltas, or as `write_export`.
    """
    if output.exists():
        raise ModelError(f"--output {output}: exists already; choose a new folder or remove it")
    if to == "adapter" and source.adapter is None:
        raise ModelError("--to adapter: this model has weights of its own and no low-rank deltas; use --to hf")
    output.parent.mkdir(parents=True, exist_ok=True)
    (write_adapter if to == "adapter" else write_export)(source, output, dtype, tokenizer_folder, texts_tokens)


def export_checkpoint(folder: Path, output: Path, dtype: str, texts_tokens: Sequence[Sequence[int]], to: str = "hf") -> None:
    """Copy a Hugging Face checkpoint folder, or an adapter, in another type.

    Raises:
        ModelError: as `export_to`.
    """
    export_to(open_pretrained(folder), output, dtype, folder, texts_tokens, to)
