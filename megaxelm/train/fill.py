"""Full fp32 weights and Adam moments put into a DeepSpeed engine of any ZeRO stage, each rank taking only its own part.

DeepSpeed makes its fp32 weights from the low-precision ones of the model it is given, which rounds them, and reads a checkpoint back only
on the same number of ranks. This goes around both: whatever can name full tensors (a parent's export, a checkpoint of another layout, a
seed's draws) fills the engine exactly. Nothing is gathered, and one full tensor exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaxelm.errors import TrainError
from megaxelm.train.zero_state import MOMENTS


@dataclass(frozen=True)
class _Place:
    """Where a rank keeps its part of a parameter: `numel` numbers from `param_start` on of the parameter, at `start` of `master`.

    `master` is the fp32 tensor that the optimiser steps, and the key of its state.
    """

    master: Tensor
    start: int
    param_start: int
    numel: int


@torch.no_grad()
def fill_engine(
    engine: Any,
    weight: Callable[[str], Tensor],
    moments: Callable[[str], dict[str, Tensor]] | None,
    optimizer_step: int,
) -> None:
    """Set weights and optimiser state of what is trained. Every rank calls it; no rank waits for another.

    Args:
        weight: full fp32 parameter by name, on the CPU; asked once for each that is trained, in the order of the model.
        moments: full `exp_avg` and `exp_avg_sq` by name; None: as if no step was taken.
        optimizer_step: updates that Adam has done, for its bias correction.

    Raises:
        TrainError: an optimiser whose layout is not known, state on NVMe, or a tensor of another shape.
    """
    optimizer = engine.optimizer
    places = _places(engine)
    adam = getattr(optimizer, "optimizer", optimizer)
    if moments is None:
        _clear(adam)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        full = weight(name)
        _check_shape(name, full, parameter)
        place = places.get(id(parameter))
        if place is not None:
            _copy(place, place.master, full)
        _fill_low_precision(parameter, full)
        if moments is not None:
            for key, moment in moments(name).items():
                if place is not None:
                    _copy(place, _state(adam, place.master, optimizer_step)[key], moment)
    if moments is not None and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def fill_frozen(engine: Any, weight: Callable[[str], Tensor]) -> None:
    """Set what is not trained, of which there is no other copy than the one that the model computes with. As `fill_engine`."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            full = weight(name)
            _check_shape(name, full, parameter)
            _fill_low_precision(parameter, full)


def _copy(place: _Place, target: Tensor, full: Tensor) -> None:
    part = full.reshape(-1)[place.param_start : place.param_start + place.numel]
    target.data.view(-1)[place.start : place.start + place.numel].copy_(part)


def _check_shape(name: str, full: Tensor, parameter: Tensor) -> None:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if tuple(full.shape) != shape:
        raise TrainError(f"{name} has shape {tuple(full.shape)}, the model has {shape}: weights and model are not of one configuration")


def _fill_low_precision(parameter: Any, full: Tensor) -> None:
    """The copy that the model computes with: all of it, or under ZeRO-3 this rank's part."""
    if hasattr(parameter, "ds_tensor"):
        share = parameter.partition_numel()
        start = share * torch.distributed.get_rank(parameter.ds_process_group)
        part = full.reshape(-1)[start : start + share]
        parameter.ds_tensor.data.view(-1)[: part.numel()].copy_(part)
        if parameter.data.numel() != full.numel():
            return  # not gathered now; it will be from the parts
    parameter.data.copy_(full)


def _state(adam: Any, master: Tensor, step: int) -> dict[str, Any]:
    """Adam's state of one tensor, made as Adam would where it is not there yet."""
    state = adam.state[master]
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(master, requires_grad=False)
    counts_in_tensor = isinstance(adam, torch.optim.Adam)  # torch's; DeepSpeed's own count in a number
    state["step"] = torch.tensor(float(step)) if counts_in_tensor else step
    return state


def _clear(adam: Any) -> None:
    """As before the first step: some of DeepSpeed's optimisers take one with zero gradients when they are made."""
    for state in adam.state.values():
        for key in state:
            state[key] = state[key].zero_() if isinstance(state[key], Tensor) else 0
    for group in adam.param_groups:
        group.pop("step", None)


def _places(engine: Any) -> dict[int, _Place]:
    """This rank's part of each parameter by the parameter's `id`; none for a parameter of which it has nothing."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        found = _zero3_places(optimizer)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        found = _vector_places(
            optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, optimizer.single_partition_of_fp32_groups, optimizer
        )
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        found = _vector_places(optimizer.bf16_groups, _offsets(optimizer.bf16_groups), optimizer.fp32_groups_flat_partition, optimizer)
    elif hasattr(optimizer, "fp32_groups_flat"):
        found = _vector_places(optimizer.fp16_groups, _offsets(optimizer.fp16_groups), optimizer.fp32_groups_flat, None)
    elif hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        found = ((param, _Place(master, 0, 0, master.numel())) for low, high in pairs for param, master in zip(low, high, strict=True))
    elif isinstance(optimizer, torch.optim.Optimizer):
        found = ((param, _Place(param, 0, 0, param.numel())) for group in optimizer.param_groups for param in group["params"])
    else:
        raise TrainError(
            f"the optimiser {type(optimizer).__name__} of DeepSpeed keeps its weights in a way that is not known here: choose ZeRO 0 to 3 "
            "with AdamW in the DeepSpeed configuration"
        )
    return {id(parameter): place for parameter, place in found}


def _offsets(groups: list[list[Tensor]]) -> list[list[int]]:
    """Where each parameter of a group begins in the vector of the group."""
    return [[sum(before.numel() for before in group[:number]) for number in range(len(group))] for group in groups]


def _vector_places(
    groups: list[list[Tensor]], offsets: list[list[int]], masters: list[Tensor], partitioned: Any | None
) -> Iterator[tuple[Tensor, _Place]]:
    """ZeRO 1 and 2: a group is one vector, of which this rank has one partition; without `partitioned`, all of it."""
    for number, (group, starts, master) in enumerate(zip(groups, offsets, masters, strict=True)):
        rank = torch.distributed.get_rank(partitioned.real_dp_process_group[number]) if partitioned is not None else 0
        begin = rank * master.numel()
        for parameter, offset in zip(group, starts, strict=True):
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + master.numel())
            if first < last:
                yield parameter, _Place(master, first - begin, first - offset, last - first)


def _zero3_places(optimizer: Any) -> Iterator[tuple[Tensor, _Place]]:
    """ZeRO 3: this rank's partitions of a sub-group lie one after the other in one vector."""
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in group:
            share = parameter.partition_numel()
            if master.numel() < start + share:
                raise TrainError("the optimiser's state is on NVMe, where it cannot be filled: set offload_optimizer.device = cpu")
            first = share * torch.distributed.get_rank(parameter.ds_process_group)
            numel = max(0, min(share, parameter.ds_numel - first))
            yield parameter, _Place(master, start, first, numel)
            start += share
