"""How a command ends: a user's mistake, an interrupt and a full disk are told in a sentence, without a traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from megaxelm.errors import MegaxelmError, Preempted

USER_ERROR = 2
TRY_AGAIN = 75
"""EX_TEMPFAIL: training was asked to stop and saved its state; the same command goes on from there."""
INTERRUPTED = 130


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt, which the command line parser would swallow."""


def end_on_signals() -> None:
    """Unwind on SIGINT and SIGTERM, so that processes which a command started end with it."""

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def run_guarded(command: Callable[[], object], prefix: str = "") -> int:
    """Run a command and return its exit code; what is a defect of the program keeps its traceback."""
    try:
        command()
    except Preempted as stopped:
        print(f"{prefix}{stopped}", file=sys.stderr, flush=True)
        return TRY_AGAIN
    except MegaxelmError as error:
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except (KeyboardInterrupt, Interrupted):
        print(f"{prefix}stopped; what was finished stays, and the same command goes on from there", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone (`| head`): nothing more may be written, not even when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        text = _about_the_disk(error)
        if text is None:
            raise
        print(f"{prefix}error: {text}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


_FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# How libraries that do not raise OSError say that the disk is full: Rust's in words, torch by the writer of its archives.
_FULL = ("os error 28", "No space left on device", "inline_container.cc")


def _about_the_disk(error: Exception) -> str | None:
    """What a full disk, or a file that may not be read or written, means for the user; None for anything else."""
    number = error.errno if isinstance(error, OSError) else None
    filename = getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in _FULL):
        where = f" at {filename}" if filename else ""
        return f"the disk is full{where}: free some space and start the same command again; what was finished stays"
    if number in _FILE_ERRORS and filename:
        return f"{filename}: {os.strerror(number).lower()}; check that the path is right and that you may read and write there"
    return None
