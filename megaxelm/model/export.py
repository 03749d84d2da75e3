"""Hugging Face checkpoints that are reloaded and compared before they take their place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megaxelm.errors import ModelError
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import check_export, load_pretrained, save_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_export(decoder: Decoder, target: Path, dtype: str, tokenizer_folder: Path, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Write `target` with its tokenizer; what lies there is replaced once the reloaded logits agree on `texts_tokens`.

    Raises:
        ModelError: an unknown dtype, or logits that do not agree.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype = {dtype}: choose {' or '.join(DTYPES)}")
    aside = target.with_name(f".{target.name}.making")
    if aside.exists():
        shutil.rmtree(aside)
    try:
        save_pretrained(decoder, aside, dtype=DTYPES[dtype], tokenizer_folder=tokenizer_folder)
        check_export(aside, decoder, texts_tokens)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_checkpoint(source: Path, output: Path, dtype: str, texts_tokens: Sequence[Sequence[int]]) -> None:
    """Copy a checkpoint folder in another type.

    Raises:
        ModelError: `output` exists already, or as `write_export`.
    """
    if output.exists():
        raise ModelError(f"--output {output}: exists already; choose a new folder or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_export(load_pretrained(source), output, dtype, source, texts_tokens)
