"""The compute type of a training on the device at hand."""

from __future__ import annotations

from typing import Literal, cast

from megaxelm.errors import TrainError
from megaxelm.recipe import Recipe

Precision = Literal["bf16", "fp16", "fp32"]


def choose_precision(wanted: str, cuda: bool) -> Precision:
    """What `train.precision` is on this device: `auto` is bf16 where bfloat16 products run in hardware, else fp32.

    Args:
        cuda: for a GPU. Where none is at hand (a plan, a job for other nodes), it is taken for one that has bfloat16.

    Raises:
        TrainError: a type asked for by name that the device does not have.
    """
    import torch

    here = cuda and torch.cuda.is_available()
    if wanted == "auto":
        supported = torch.cuda.is_bf16_supported(including_emulation=False) if here else cuda or has_fast_bfloat16()
        return "bf16" if supported else "fp32"
    if wanted == "fp16" and not cuda and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise TrainError("train.precision = fp16: this CPU has no half-precision arithmetic; choose bf16 or fp32, or train on a GPU")
    if wanted == "bf16" and here and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise TrainError(f"train.precision = bf16: {torch.cuda.get_device_name()} has no bfloat16 arithmetic; choose fp16 or fp32")
    return cast(Precision, wanted)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in vector instructions (AVX-512, AMX, ARM's BF16), and not a number at a time."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def on_device(recipe: Recipe, cuda: bool) -> Recipe:
    """The recipe with the precision that this device computes in.

    Raises:
        TrainError: as `choose_precision`.
    """
    precision = choose_precision(recipe.train.precision, cuda)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def precision_notes(recipe: Recipe, cuda: bool) -> list[str]:
    """What a user should hear of it: which type `auto` became, or that the CPU has to emulate the one asked for."""
    wanted = recipe.train.precision
    if wanted == "auto":
        chosen = choose_precision(wanted, cuda)
        why = "has" if chosen == "bf16" else "has no"
        return [f"train.precision = auto: {chosen}, since this {'GPU' if cuda else 'CPU'} {why} bfloat16 arithmetic"]
    if wanted == "bf16" and not cuda and not has_fast_bfloat16():
        return ["train.precision = bf16: this CPU has no bfloat16 arithmetic and emulates it, many times slower than fp32; auto takes fp32"]
    return []
