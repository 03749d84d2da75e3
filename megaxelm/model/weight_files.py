"""Files of weights, one tensor at a time: safetensors in one file or several, and the older pytorch_model.bin.

Reading and writing use plain file operations. A memory map would count every page it has touched as resident memory of the process,
which for a model is all of it.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.errors import ModelError

DEFAULT_SHARD_BYTES = 5_000_000_000
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS_INDEX = _INDEXES[0]
_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `read()` brings it into memory and raises ModelError when the file is damaged."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def read_numbers(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies at byte `offset` of a file, in row order.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    numbers = torch.empty(math.prod(shape), dtype=dtype)
    space = numbers.view(torch.uint8).numpy()
    with open(path, "rb") as file:
        file.seek(offset)
        found = file.readinto(space.data) if space.size else 0
    if found != space.size:
        raise EOFError(f"{space.size} bytes wanted at {offset}, {found} found")
    return numbers.view(shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name; nothing but headers is read until `read()` is called.

    A pytorch_model.bin is read without running its pickle.

    Raises:
        ModelError: no weights, files missing, or headers damaged.
    """
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        found |= safetensors_of(path) if path.suffix == ".safetensors" else _pickled(path)
    return found


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or several files and their index, holding one tensor at a time.

    Args:
        shapes: of all tensors, in the order in which they are asked for and written.
        dtype: type in the files.
        read: tensor by name; of the shape that was given.
        max_shard_bytes: a file that would grow beyond this ends; a single tensor may be larger.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size, total = 0, 0
    for name, shape in shapes.items():
        nbytes = dtype.itemsize * math.prod(shape)
        if size and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILES[0] if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_weight_file(folder / file, shard, dtype, read)
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weight_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]) -> None:
    """Write one safetensors file; as `write_safetensors`."""
    code = next(code for code, known in _CODES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in shapes.items():
            tensor = read(name).detach().to(device="cpu", dtype=dtype).contiguous()
            assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def safetensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        ModelError: damaged, or of a type that is none of a decoder's.
    """
    from safetensors import safe_open

    with _damage_named(path):
        with safe_open(path, framework="pt", device="cpu"):
            pass  # it checks the whole header against the file
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        unknown = sorted({entry["dtype"] for entry in header.values()} - _CODES.keys())
        if unknown:
            raise ModelError(f"{path}: tensors of type {', '.join(unknown)}, which are not weights of a decoder; choose another checkpoint")

    def stored(entry: dict[str, Any]) -> StoredTensor:
        offset, dtype, shape = 8 + length + entry["data_offsets"][0], _CODES[entry["dtype"]], tuple(entry["shape"])

        def read() -> Tensor:
            with _damage_named(path):
                return read_numbers(path, offset, dtype, shape)

        return StoredTensor(shape, dtype, read)

    return {name: stored(entry) for name, entry in header.items()}


def _pickled(path: Path) -> dict[str, StoredTensor]:
    with _damage_named(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: StoredTensor(tuple(tensor.shape), tensor.dtype, partial(_same, tensor)) for name, tensor in state.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder.

    Raises:
        ModelError: no such file, or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a checkpoint folder holds config.json and weights") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); the checkpoint is damaged, copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for single, index in zip(SINGLE_FILES, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            named = [str(file) for file in weight_map.values()] if isinstance(weight_map, dict) else []
            if not named or any(Path(file).name != file for file in named):
                raise ModelError(f"{folder / index}: weight_map is missing or names no files of this folder; copy the checkpoint again")
            files = [folder / file for file in sorted(set(named))]
            absent = [path.name for path in files if not path.is_file()]
            if absent:
                raise ModelError(f"{folder}: the index names files that are not there: {', '.join(absent)}; copy the checkpoint again")
            return files
    raise ModelError(f"{folder}: no weights; expected one of {', '.join((*SINGLE_FILES, *_INDEXES))}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Errors of a reader become one ModelError that names the file."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # safetensors, zipfile and unpickler each have their own kinds; all mean the file is damaged
        raise ModelError(f"{path}: truncated or damaged ({type(error).__name__}: {error}); copy it again") from None
