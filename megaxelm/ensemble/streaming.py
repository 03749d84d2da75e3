"""Token ids to text, piece by piece, without decoding the whole text again for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_CONTEXT = 8
"""Ids of the text before that are decoded along: a piece alone would lose its leading space."""
_LONGEST_WAIT = 16
"""Ids held back at most while a character seems unfinished (4 bytes of UTF-8 need no more than 4)."""


class TextStream:
    """Turns ids into text as they come; a character spelt in bytes is held back until it is whole.

    Args:
        decode: ids to text. before: ids already shown (the prompt), which decide about the space in front of the first piece.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._shown = list(before[-_CONTEXT:])
        self._waiting: list[int] = []

    def copy(self) -> TextStream:
        """A stream of its own with the same text so far."""
        stream = TextStream(self._decode, self._shown)
        stream._waiting = list(self._waiting)
        return stream

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` complete; empty while a character is unfinished."""
        pieces = []
        for token in ids:
            self._waiting.append(token)
            text = self._new_text()
            if not text.endswith(_REPLACEMENT) or len(self._waiting) >= _LONGEST_WAIT:
                pieces.append(self._show(text))
        return "".join(pieces)

    def flush(self) -> str:
        """What is still held back, with U+FFFD where bytes make no character."""
        return self._show(self._new_text()) if self._waiting else ""

    def _new_text(self) -> str:
        before = self._decode(self._shown) if self._shown else ""
        whole = self._decode(self._shown + self._waiting)
        # Bytes of the prompt can become one character with new ones; then the two share no prefix and the rest is what grew.
        return whole[len(before) :] if whole.startswith(before) else whole[len(before.rstrip(_REPLACEMENT)) :]

    def _show(self, text: str) -> str:
        self._shown = (self._shown + self._waiting)[-_CONTEXT:]
        self._waiting = []
        return text


class StopText:
    """Ends a stream of text before the first of some strings; text that may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether one of the strings has come."""

    def push(self, text: str) -> str:
        """What of the text so far may be shown now and was not yet."""
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stop)) - 1
        begun = next(
            (begin for begin in range(max(0, len(text) - longest), len(text)) if any(stop.startswith(text[begin:]) for stop in self._stop)),
            len(text),
        )
        self._held = text[begun:]
        return text[:begun]

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class TextSpace:
    """A vector space that reads text (`TfidfSpace` with the `char` or `word` analyzer), for a router that is told token ids."""

    def __init__(self, space: Any, decode: Callable[[list[int]], str]) -> None:
        self._space, self._decode = space, decode

    def start(self) -> tuple[Any, TextStream]:
        """The state of the empty text."""
        return self._space.start(), TextStream(self._decode)

    def push(self, state: tuple[Any, TextStream], token_ids: Sequence[int]) -> None:
        """Add token ids; the bytes of an unfinished character wait for the rest of it."""
        if text := state[1].push(token_ids):
            self._space.push(state[0], text)

    def vector(self, state: tuple[Any, TextStream]) -> Any:
        """Vector of the text so far, [dimensions]."""
        return self._space.vector(state[0])

    def prefixes(self, state: tuple[Any, TextStream], token_ids: Sequence[int]) -> Any:
        """Vectors before each token that follows, [tokens, dimensions]; `state` goes on to their end."""
        return self._space.prefixes(state[0], [state[1].push([token]) for token in token_ids])
