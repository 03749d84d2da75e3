"""How the last attempt to train a model ended, kept in its folder for `megaxelm status` and for who starts it again.

Whoever starts the training processes writes `ended.json`; a new attempt removes it. A model whose processes died together with what
started them has neither this note nor the marker of a finished one, and that is told too.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megaxelm.errors import StageError
from megaxelm.files import read_json, write_json

ENDED = "ended.json"


@dataclass(frozen=True)
class Ending:
    """`state`: `preempted` or `failed`. `when` in seconds since 1970; `by`: the Slurm job, or `megaxelm train`."""

    state: str
    exit_code: int
    reason: str
    by: str
    when: float


def begin_attempt(folder: Path) -> None:
    """Forget how the attempt before ended."""
    (folder / ENDED).unlink(missing_ok=True)


def end_attempt(folder: Path, state: str, exit_code: int, reason: str, by: str) -> None:
    write_json(folder / ENDED, asdict(Ending(state, exit_code, reason, by, time.time())))


def last_ending(folder: Path) -> Ending | None:
    """How the last attempt ended; None when it runs, was finished, or died without a word."""
    if not (folder / ENDED).exists():
        return None
    try:
        found = read_json(folder / ENDED, state=str, exit_code=int, reason=str, by=str, when=float)
    except StageError:
        return None  # a note that is half there says as much as none
    return Ending(**{name: found[name] for name in ("state", "exit_code", "reason", "by", "when")})


def reason_in_log(log: str) -> str:
    """The sentence in which a trainer told its mistake, or the last lines of its log."""
    lines = [line for line in log.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "error: " in line and not line.startswith("srun: ")), None)
    if told is not None and (told.startswith("error: ") or _is_prefix(told.split("error: ", 1)[0])):
        return told.split("error: ", 1)[1]
    return "last lines of its log:\n    " + "\n    ".join(lines[-8:])


def _is_prefix(text: str) -> bool:
    """`3: ` of `srun --label`, `rank 3: ` of the trainer, or both."""
    return text.replace("rank ", "").replace(": ", "").strip().isdigit()
