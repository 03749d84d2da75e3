"""Training figures: one JSON line and one TensorBoard point every `train.log_every` steps.

A line: step (done), loss (nats per predicted token, mean since the last line), lr, grad_norm (before clipping), tokens (consumed so far),
language_tokens ({language: tokens}, which add up to `tokens`), tokens_per_second (since the last line), seconds (of training in this
process).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Writer of `metrics.jsonl` and `tensorboard/` in an expert's folder; used by rank 0 alone."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self._drop_after(resume_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the writer

    def _drop_after(self, step: int) -> None:
        """Lines of steps that will be done again are dropped, and so is a line that a kill cut in half."""
        if not self.path.exists():
            return
        kept = [json.dumps(line) for line in read_metrics(self.path) if line["step"] <= step]
        aside = self.path.with_suffix(".new")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in line.items():
            points = {f"{key}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
            for name, point in points.items() if key != "step" else ():
                self._board.add_scalar(f"train/{name}", point, line["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`; a last line cut by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
