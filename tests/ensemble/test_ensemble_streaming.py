"""Text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.ensemble.streaming import TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def decode_words(ids: Sequence[int]) -> str:
    """A decoder that, like those of SentencePiece with a dummy prefix, drops the space in front of the first piece."""
    return "".join([" the", " cat", "s", " "][token] for token in ids).removeprefix(" ")


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.sampled_from(["", "п", "привет", "a b "]))
def test_pieces_join_to_the_whole_text(text: str, prompt: str) -> None:
    stream = TextStream(decode_bytes, list(prompt.encode()))
    pieces = [stream.push([token]) for token in text.encode()]
    assert "".join(pieces) + stream.flush() == text


def test_an_unfinished_character_is_held_back() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push([byte]) for byte in "aж猫".encode()] == ["a", "", "ж", "", "", "猫"]


def test_bytes_that_make_no_character_come_out_in_the_end() -> None:
    stream = TextStream(decode_bytes)
    assert stream.push([0xD0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_bytes_that_never_make_a_character_are_not_held_for_ever() -> None:
    stream = TextStream(decode_bytes)
    shown = [stream.push([0xFF]) for _ in range(40)]
    assert "".join(shown).count("\ufffd") >= 30


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    first, second = "ж".encode()
    stream = TextStream(decode_bytes, [*b"a", first])
    assert stream.push([second]) == "ж"


@pytest.mark.parametrize(("prompt", "expected"), [([0], " cats"), ([], "cats")])
def test_the_space_after_the_prompt_is_kept(prompt: list[int], expected: str) -> None:
    stream = TextStream(decode_words, prompt)
    assert stream.push([1]) + stream.push([2]) == expected
