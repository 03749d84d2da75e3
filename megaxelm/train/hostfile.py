"""The nodes of a training that `deepspeed` starts by ssh."""

from __future__ import annotations

import re
from pathlib import Path

from megaxelm.errors import TrainError


def read_hostfile(path: Path) -> dict[str, int]:
    """Devices by node, from lines `worker-1 slots=8`. DeepSpeed itself only warns of a missing file, and trains on this node alone.

    Raises:
        TrainError: missing, empty, a line of another form, or a node that comes twice.
    """
    if not path.is_file():
        raise TrainError(f"--hostfile {path}: no such file; write one line a node, such as `worker-1 slots=8`")
    nodes: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]*)", text)
        if match is None:
            raise TrainError(f"--hostfile {path}, line {number}: {line.strip()!r} is not of the form `worker-1 slots=8`")
        if match[1] in nodes:
            raise TrainError(f"--hostfile {path}, line {number}: {match[1]} comes twice; give a node one line with all its slots")
        nodes[match[1]] = int(match[2])
    if not nodes:
        raise TrainError(f"--hostfile {path}: names no node; write one line a node, such as `worker-1 slots=8`")
    return nodes
