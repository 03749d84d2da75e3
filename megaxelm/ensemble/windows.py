"""Windows: how a text that is longer than a model's positions is read, so that each token is scored once and has text before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megaxelm.errors import RoutingError


class Window(NamedTuple):
    """One piece of `[start] + ids` that is read in one go: the places `begin` to `end`, of which those from `first` on are scored.

    Place p predicts ids[p], so ids[first:end] are scored, and ids[first] with first - begin + 1 tokens before it.
    """

    begin: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return self.end - self.begin


@dataclass(frozen=True)
class Windows:
    """The sliding window of rolling log-likelihoods (lm-evaluation-harness: `get_rolling_token_windows`).

    Args:
        size: tokens read in one go; None: as many as the model has positions.
        min_context: tokens that each token at least has before it in its window, but for the front of the text; None: half of the size.
            A window so goes `size - min_context + 1` tokens beyond the one before.
    """

    size: int | None = None
    min_context: int | None = None

    def resolve(self, max_positions: int) -> tuple[int, int]:
        """Size and context in tokens for a model of so many positions.

        Raises:
            RoutingError: a value out of range.
        """
        size = max_positions if self.size is None else self.size
        if not 1 <= size <= max_positions:
            raise RoutingError(f"window = {size}: choose 1 to {max_positions}, the positions of the experts")
        context = max(1, size // 2) if self.min_context is None else self.min_context
        if not 1 <= context <= size:
            raise RoutingError(f"min_context = {context}: choose 1 to {size}, the tokens of a window")
        return size, context

    def cut(self, length: int, max_positions: int, first: int = 0) -> list[Window]:
        """Windows that score ids[first:length], each once, in the order of the text; a text that fits is one window.

        Raises:
            RoutingError: as `resolve`.
        """
        size, context = self.resolve(max_positions)
        if first >= length:
            return []
        step = size - context + 1
        end = min(max(size, first + step), length)
        found = [Window(max(0, end - size), first, end)]
        while end < length:
            first, end = end, min(end + step, length)
            found.append(Window(end - size, first, end))
        return found
