"""Plain values as JSON and arrays as safetensors, and what a damaged file of them says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError


def write_state(settings_path: Path, arrays_path: Path, settings: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Plain values as JSON, arrays (if any) as safetensors."""
    from safetensors.numpy import save_file

    settings_path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if arrays:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, arrays_path)


def read_state(settings_path: Path, arrays_path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What `write_state` wrote; no arrays where the file is absent.

    Raises:
        ClusterError: if a file is missing or damaged.
    """
    from safetensors.numpy import load_file

    if not settings_path.is_file():
        raise ClusterError(f"{settings_path}: no such file; the stage `clusters` makes it")
    with damaged_is_an_error(settings_path):
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    if not arrays_path.exists():
        return settings, {}
    with damaged_is_an_error(arrays_path):
        return settings, load_file(arrays_path)


def entry(settings: Mapping[str, Any], key: str, *types: type) -> Any:
    """`settings[key]`, which must be of one of `types`; TypeError where it is not, KeyError where it is missing."""
    value = settings[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{key} = {value!r} is no {' or '.join(kind.__name__ for kind in types)}")
    return value


@contextmanager
def damaged_is_an_error(path: Path) -> Iterator[None]:
    """Turns what a damaged file raises into a ClusterError that names the file and the way out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        what = f"missing entry {error}" if isinstance(error, KeyError) else str(error)
        raise ClusterError(f"{path}: damaged ({what}); make the stage that wrote it again, e.g. with --from clusters") from None
