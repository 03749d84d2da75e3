"""What a DeepSpeed checkpoint folder holds, by parameter: fp32 weights and Adam moments of any ZeRO stage and number of ranks.

    state = CheckpointState.open(Path("runs/demo/experts/dense/checkpoints/500"))
    for name in state.names:
        weight = state.weight(name)

Only the structure of the files is loaded; a tensor is read from its place in them when it is asked for. Neither DeepSpeed nor a process
group nor a GPU is needed, and the pickles cannot run code. How the stages lay their state out:

- ZeRO 1 and 2: each parameter group is one vector of all its parameters, cut into equal partitions, one a rank.
- ZeRO 3: each parameter is cut into equal partitions, one a rank; a rank joins its partitions of a sub-group into one vector.
- ZeRO 0: rank 0 writes whole tensors; in fp32 the weights are the model's own, else the optimiser holds fp32 copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.errors import CheckpointError
from megaxelm.model.weight_files import read_numbers

MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "weight"


@dataclass(frozen=True)
class _Stretch:
    """Consecutive numbers of a file: byte offset, type, and how many."""

    path: Path
    offset: int
    dtype: torch.dtype
    numel: int

    def part(self, start: int, numel: int) -> _Stretch:
        return _Stretch(self.path, self.offset + start * self.dtype.itemsize, self.dtype, numel)


@dataclass(frozen=True)
class _Saved:
    """One parameter: its shape, and the stretches that make it up, by what they hold (`weight`, `exp_avg`, `exp_avg_sq`)."""

    shape: tuple[int, ...]
    stretches: dict[str, tuple[_Stretch, ...]]


class CheckpointState:
    """Weights and moments of one checkpoint folder, read one tensor at a time.

    Attributes:
        names: parameters in the order of the model; of tied ones the first.
        optimizer_step: updates that Adam counts in its bias correction.
    """

    def __init__(self, tag: Path, saved: dict[str, _Saved], names: tuple[str, ...], optimizer_step: int) -> None:
        self.tag = tag
        self.names = names
        self.optimizer_step = optimizer_step
        self._saved = saved

    @classmethod
    def open(cls, tag: Path) -> CheckpointState:
        """Read the structure of a checkpoint folder.

        Raises:
            CheckpointError: no such folder, files missing or damaged, or a layout that is not one of those above.
        """
        model_files = sorted(tag.glob("*mp_rank_*_model_states.pt"), key=_rank_in_name)
        if not model_files:
            raise CheckpointError(f"{tag}: no DeepSpeed checkpoint (no *_model_states.pt); give a folder checkpoints/<step> of an expert")
        model = _load_structure(model_files[0])
        with _understood(model_files[0]):
            _refuse_parallel(tag, model)
            names = _names_once(model)
            if model["optimizer"] is not None:
                saved, step = _read_whole(model_files[0], model, names)
            else:
                saved, step = _read_partitions(tag, model)
                names = tuple(name for name in names if name in saved)
        if set(names) != set(saved):
            raise CheckpointError(f"{tag}: weights and optimiser state name different parameters; the checkpoint is damaged")
        return cls(tag, saved, names, step)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full parameter."""
        return self._saved[name].shape

    def weight(self, name: str) -> Tensor:
        """The full parameter, fp32 on the CPU.

        Raises:
            CheckpointError: a file ends early.
        """
        return self._read(name, _WEIGHT)

    def moments(self, name: str) -> dict[str, Tensor]:
        """Adam's moments of the full parameter, fp32 on the CPU; zeros when no step was taken yet.

        Raises:
            CheckpointError: a file ends early.
        """
        return {key: self._read(name, key) for key in MOMENTS}

    def _read(self, name: str, key: str) -> Tensor:
        saved = self._saved[name]
        full = torch.zeros(math.prod(saved.shape), dtype=torch.float32)
        start = 0
        for stretch in saved.stretches.get(key, ()):
            full[start : start + stretch.numel] = _read_stretch(stretch)
            start += stretch.numel
        return full.view(saved.shape)


def _read_stretch(stretch: _Stretch) -> Tensor:
    try:
        return read_numbers(stretch.path, stretch.offset, stretch.dtype, (stretch.numel,))
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{stretch.path}: damaged ({error}); use an earlier checkpoint") from None


class _Ignored:
    """Stands for DeepSpeed's own small classes in its pickles; what they hold is not needed."""


class _Number(int):
    """Stands for DeepSpeed's enumeration of stages."""


_STAND_INS: list[Any] = [
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def _load_structure(path: Path) -> dict[str, Any]:
    """The file's content with tensors that have shape, type and place, but no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with torch.serialization.safe_globals(_STAND_INS), FakeTensorMode():
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip file, a pickle that is cut, a class that is not DeepSpeed's: each has its own kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not readable as a DeepSpeed checkpoint ({reason}); use an earlier checkpoint") from None
    return state


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """A key or type that is not where DeepSpeed puts it is told as such."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not the layout of a ZeRO 0 to 3 checkpoint ({type(error).__name__}: {error}); it was written by another version of "
            "DeepSpeed or is damaged"
        ) from None


def _refuse_parallel(tag: Path, model: dict[str, Any]) -> None:
    if (model.get("mp_world_size") or 1) > 1:
        raise CheckpointError(
            f"{tag}: written with tensor parallelism over {model['mp_world_size']} ranks, which is not read here; train with ZeRO alone"
        )
    if model.get("frozen_param_shapes"):
        raise CheckpointError(f"{tag}: has parameters that were not trained ({', '.join(model['frozen_param_shapes'])}); all must be")


def _names_once(model: dict[str, Any]) -> tuple[str, ...]:
    """Names of the model's parameters in its order; one that shares its numbers with an earlier one (a tied head) is left out."""
    shared = model.get("shared_params") or {}
    names, places = [], set()
    for name, tensor in model["module"].items():
        place = (_offset(tensor), tensor.storage_offset(), tensor.numel())
        if name in shared or name in model["buffer_names"] or (tensor.numel() and place in places):
            continue
        names.append(name)
        places.add(place)
    return tuple(names)


def _offset(tensor: Tensor) -> int:
    place = tensor.untyped_storage()._checkpoint_offset  # set by a load without numbers
    assert place is not None
    return place


def _stretch(path: Path, tensor: Tensor) -> _Stretch:
    assert tensor.is_contiguous(), "optimisers save contiguous tensors"
    return _Stretch(path, _offset(tensor) + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.dtype, tensor.numel())


def _cut(stretches: list[_Stretch], start: int, numel: int) -> tuple[_Stretch, ...]:
    """`numel` numbers from `start` on of a vector that lies in consecutive stretches."""
    parts = []
    for stretch in stretches:
        first, last = max(start, 0), min(start + numel, stretch.numel)
        if first < last:
            parts.append(stretch.part(first, last - first))
        start -= stretch.numel
    return tuple(parts)


def _flat_states(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Adam's state of each tensor it was given, in order; empty before its first step."""
    order = [index for group in optimizer["param_groups"] for index in group["params"]]
    return [optimizer["state"].get(index, {}) for index in order]


def _step(path: Path, optimizer: dict[str, Any]) -> int:
    """Updates so far, wherever this kind of Adam counts them."""
    counts = [state["step"] for state in optimizer["state"].values() if "step" in state]
    counts += [group["step"] for group in optimizer["param_groups"] if "step" in group]
    if not counts:
        return 0
    count = counts[0]
    return int(_read_stretch(_stretch(path, count))) if isinstance(count, Tensor) else int(count)


def _read_whole(path: Path, model: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, _Saved], int]:
    """ZeRO 0: matrices first, then vectors, as the engine's parameter groups have them."""
    module, wrapped = model["module"], model["optimizer"]
    optimizer = wrapped.get("optimizer_state_dict", wrapped)
    states = _flat_states(optimizer)
    groups = [[name for name in names if module[name].ndim > 1], [name for name in names if module[name].ndim <= 1]]
    groups = [group for group in groups if group]
    saved: dict[str, _Saved] = {}
    if "fp32_groups_flat" in wrapped:
        for group, flat, state in zip(groups, wrapped["fp32_groups_flat"], states, strict=True):
            tensors = {_WEIGHT: flat} | {key: state[key] for key in MOMENTS if key in state}
            vectors = {key: [_stretch(path, tensor)] for key, tensor in tensors.items()}
            saved |= _named_cuts(path, vectors, {name: tuple(module[name].shape) for name in group}, [0] * len(group))
        return saved, _step(path, optimizer)
    order = [name for group in groups for name in group]
    copies = [tensor for group in wrapped["fp32_groups"] for tensor in group] if "fp32_groups" in wrapped else [module[n] for n in order]
    if len(order) != len(copies) or len(order) != len(states):
        raise CheckpointError(f"{path}: {len(order)} parameters, but {len(copies)} weights and {len(states)} states of the optimiser")
    for name, copy, state in zip(order, copies, states, strict=True):
        shape = tuple(module[name].shape)
        tensors = {_WEIGHT: copy} | {key: state[key] for key in MOMENTS if key in state}
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{path}: {key} of {name} has shape {tuple(tensor.shape)}, the parameter {shape}")
        saved[name] = _Saved(shape, {key: (_stretch(path, tensor),) for key, tensor in tensors.items()})
    return saved, _step(path, optimizer)


def _read_partitions(tag: Path, model: dict[str, Any]) -> tuple[dict[str, _Saved], int]:
    """ZeRO 1 to 3: one file of optimiser state a rank."""
    paths = sorted(tag.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_in_name)
    if not paths:
        raise CheckpointError(f"{tag}: the files of the optimiser (*_optim_states.pt) are missing; use an earlier checkpoint")
    ranks = [_load_structure(path)["optimizer_state_dict"] for path in paths]
    counts = ranks[0]["partition_count"]
    for count in counts if isinstance(counts, list) else [counts]:
        if count != len(ranks):
            raise CheckpointError(f"{tag}: {count} ranks wrote it, but {len(ranks)} files of the optimiser are here; some are missing")
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    if ranks[0].get("zero_stage") == 3:
        saved = _cut_each_parameter(tag, paths, ranks, shapes)
        return saved, _step(paths[0], ranks[0]["optimizer_state_dict"])
    saved = _cut_each_group(tag, paths, ranks, shapes)
    return saved, _step(paths[0], ranks[0]["base_optimizer_state"])


def _cut_each_group(
    tag: Path, paths: list[Path], ranks: list[dict[str, Any]], shapes: list[dict[str, tuple[int, ...]]]
) -> dict[str, _Saved]:
    """ZeRO 1 and 2: partitions are saved without the padding at their end, moments with it."""
    if not isinstance(ranks[0]["base_optimizer_state"], dict):
        raise CheckpointError(f"{tag}: written with zero_optimization.elastic_checkpoint, which is not read here; take it out")
    states = [_flat_states(rank["base_optimizer_state"]) for rank in ranks]
    saved: dict[str, _Saved] = {}
    for number, group in enumerate(shapes):
        vectors: dict[str, list[_Stretch]] = {_WEIGHT: []}
        for rank, path in enumerate(paths):
            partition = _stretch(path, ranks[rank]["single_partition_of_fp32_groups"][number])
            vectors[_WEIGHT].append(partition)
            for key in MOMENTS:
                if key in states[rank][number]:
                    vectors.setdefault(key, []).append(_stretch(path, states[rank][number][key]).part(0, partition.numel))
        paddings = ranks[0].get("param_alignment_paddings")
        saved |= _named_cuts(tag, vectors, group, paddings[number] if paddings else [0] * len(group))
    return saved


def _named_cuts(
    where: Path, vectors: dict[str, list[_Stretch]], shapes: dict[str, tuple[int, ...]], paddings: list[int]
) -> dict[str, _Saved]:
    """Parameters that lie one after the other in a vector, each followed by its padding."""
    saved: dict[str, _Saved] = {}
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        numel = math.prod(shape)
        saved[name] = _Saved(shape, {key: _cut(stretches, start, numel) for key, stretches in vectors.items()})
        start += numel + padding
    held, *others = (sum(stretch.numel for stretch in stretches) for stretches in vectors.values())
    if held < start or any(other != held for other in others):
        raise CheckpointError(f"{where}: a group has {held} numbers, its parameters {start}; files of different checkpoints are mixed")
    return saved


def _cut_each_parameter(
    tag: Path, paths: list[Path], ranks: list[dict[str, Any]], shapes: list[dict[str, tuple[int, ...]]]
) -> dict[str, _Saved]:
    """ZeRO 3: of each parameter a rank has ceil(numel / ranks) numbers; the last ones are padding."""
    states = [_flat_states(rank["optimizer_state_dict"]) for rank in ranks]
    saved: dict[str, _Saved] = {}
    for number, group in enumerate(shapes):
        vectors: list[dict[str, _Stretch]] = []
        for rank, path in enumerate(paths):
            tensors = {_WEIGHT: ranks[rank]["fp32_flat_groups"][number]}
            tensors |= {key: states[rank][number][key] for key in MOMENTS if key in states[rank][number]}
            vectors.append({key: _stretch(path, tensor) for key, tensor in tensors.items()})
        start = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            share = -(-numel // len(ranks))
            stretches = {
                key: tuple(
                    vector[key].part(start, min(share, numel - rank * share)) for rank, vector in enumerate(vectors) if numel > rank * share
                )
                for key in vectors[0]
            }
            saved[name] = _Saved(shape, stretches)
            start += share
        if any(vector[_WEIGHT].numel < start for vector in vectors):
            raise CheckpointError(
                f"{tag}: a rank's part is smaller than its parameters need; the optimiser was offloaded to NVMe (not read here), or files "
                "of different checkpoints are mixed"
            )
    return saved


def _rank_in_name(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"rank_(\d+)", path.name))
