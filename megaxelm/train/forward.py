"""Which attention, kernels and chunks of the loss a training's forward pass runs with."""

from __future__ import annotations

from typing import Any

import torch

from megaxelm.errors import TrainError
from megaxelm.model.config import DecoderConfig
from megaxelm.recipe import TrainConfig
from megaxelm_kernels.attention import choose_backend
from megaxelm_kernels.backend import choose_kernels

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def forward_options(train: TrainConfig, model: DecoderConfig, device: torch.device) -> dict[str, Any]:
    """Arguments `attention`, `kernels` and `loss_chunk_rows` of `Decoder.forward`; `auto` is settled for `device`.

    Raises:
        TrainError: a backend or kernels that cannot run here.
    """
    try:
        attention = choose_backend(train.attention, device, model.attention_dropout, head_dim=model.head_dim, dtype=_TYPES[train.precision])
    except ValueError as error:
        raise TrainError(f"train.attention = {train.attention}: {error}") from None
    if train.compile and train.kernels == "triton":
        raise TrainError(
            "train.kernels = triton with train.compile = true, which would stop at each kernel: choose auto or torch, or no compile"
        )
    try:
        # What torch.compile fuses by itself, the project's kernels would only divide.
        kernels = "torch" if train.compile else choose_kernels(train.kernels, device)
    except ValueError as error:
        raise TrainError(f"train.{error}") from None
    return {"attention": attention, "kernels": kernels, "loss_chunk_rows": train.loss_chunk_rows}
