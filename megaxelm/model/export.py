"""Hugging Face checkpoints that are reloaded and compared before they take their place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megaxelm.errors import ModelError
from megaxelm.model.hub import check_export, open_pretrained, save_pretrained
from megaxelm.model.memory import large_blocks_apart
from megaxelm.model.source import WeightSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_export(source: WeightSource, target: Path, dtype: str, tokenizer_folder: Path, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Write `target` with its tokenizer; what lies there is replaced once the reloaded logits agree on `texts_tokens`.

    Raises:
        ModelError: an unknown dtype, or logits that do not agree.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype = {dtype}: choose {' or '.join(DTYPES)}")
    source = replace(source, config=replace(source.config, residual_dropout=0.0, attention_dropout=0.0))
    aside = target.with_name(f".{target.name}.making")
    if aside.exists():
        shutil.rmtree(aside)
    try:
        with large_blocks_apart():
            save_pretrained(source, aside, dtype=DTYPES[dtype], tokenizer_folder=tokenizer_folder)
            check_export(aside, source, texts_tokens)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_to(source: WeightSource, output: Path, dtype: str, tokenizer_folder: Path, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Write a checkpoint into a folder that a user named.

    Raises:
        ModelError: `output` exists already, or as `write_export`.
    """
    if output.exists():
        raise ModelError(f"--output {output}: exists already; choose a new folder or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_export(source, output, dtype, tokenizer_folder, texts_tokens)


def export_checkpoint(folder: Path, output: Path, dtype: str, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Copy a Hugging Face checkpoint folder in another type.

    Raises:
        ModelError: `output` exists already, or as `write_export`.
    """
    export_to(open_pretrained(folder), output, dtype, folder, texts_tokens)
