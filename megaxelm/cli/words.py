"""Options that take several words: `--languages az he` as well as `--languages az,he`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand

_SEVERAL = {"--languages", "--experts", "--corpus", "--valid"}


class SeveralWords(TyperCommand):
    """A verb with options that take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_options(args, _SEVERAL))


def repeat_options(words: Sequence[str], several: Collection[str]) -> list[str]:
    """`RUN --languages az he` as `RUN --languages az --languages he`.

    Only where the RUN stands in front: behind an option it could be the last of its words.
    """
    found: list[str] = []
    option, values = "", 0
    for word in words:
        if word.startswith("-"):
            option, _, value = word.partition("=")
            values = int(bool(value))
        elif option in several and values and not words[0].startswith("-"):
            found.append(option)
        else:
            values += 1
        found.append(word)
    return found
