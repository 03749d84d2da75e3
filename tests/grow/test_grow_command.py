"""What the commands `grow` and `drop` hand on, say, and end with; no run is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megaxelm.cli import app
from megaxelm.cli.words import repeat_options
from megaxelm.console import run_guarded
from megaxelm.errors import GrowError
from megaxelm.grow.make import GrowOptions


class Called:
    """Stands for the function behind a command; keeps what it was given and answers `answer`, or raises it."""

    def __init__(self, answer: Any = True) -> None:
        self.answer = answer
        self.given: tuple[Any, ...] = ()

    def __call__(self, folder: Any, recipe: Any, *given: Any) -> Any:
        self.given = given
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def command(patch: pytest.MonkeyPatch, called: Called, verb: str, *words: str) -> int:
    """Run a verb with `called` in place of what it calls; returns the exit code."""
    patch.setattr("megaxelm.cli.grow.open_run", lambda run, overrides, runs: (SimpleNamespace(path=Path(run)), None))
    patch.setattr("megaxelm.grow.make.grow" if verb == "grow" else "megaxelm.grow.drop.drop", called)
    return run_guarded(lambda: app([verb, "run", *words], standalone_mode=False))


def test_every_option_of_grow_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called()
    words = (
        "--languages az,he --languages sv --corpus c.jsonl --valid v.jsonl --donor bits --replay 0.5 --steps 7 --lapt --together --dry-run"
    )
    assert command(monkeypatch, called, "grow", *words.split(), "--set", "train.lr=1") == 0
    (options,) = called.given
    assert options == GrowOptions(["az", "he", "sv"], ["c.jsonl"], ["v.jsonl"], "bits", 0.5, 7, True, True, True, ["train.lr=1"])
    assert command(monkeypatch, called, "grow", "--languages", "az") == 0
    assert called.given == (GrowOptions(["az"], (), (), "auto", 0.25, None, False, False, False, ()),)


def test_several_words_are_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called()
    assert command(monkeypatch, called, "grow", *"--languages az he,pl sv --corpus a b --lapt --valid=c d --steps 3".split()) == 0
    (options,) = called.given
    assert options == GrowOptions(["az", "he", "pl", "sv"], ["a", "b"], ["c", "d"], steps=3, lapt=True)
    assert command(monkeypatch, called, "drop", "--experts", "a", "b", "--undo") == 0
    assert called.given == ([], ["a", "b"], True)


def test_a_run_behind_its_options_is_no_value_of_them() -> None:
    words = ["--lapt", "--languages", "az", "runs/x"]
    assert repeat_options(words, {"--languages"}) == words
    assert repeat_options(["runs/x", *words[:3]], {"--languages"}) == ["runs/x", *words[:3]]
    assert repeat_options(["x", "--donor", "a", "b", "--languages"], {"--languages"}) == ["x", "--donor", "a", "b", "--languages"]
    assert repeat_options([], {"--languages"}) == []


def test_grow_says_that_there_is_nothing_to_do_where_nothing_was_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer, words, said in ((False, [], True), (True, [], False), (False, ["--dry-run"], False)):
        assert command(monkeypatch, Called(answer), "grow", "--languages", "az", *words) == 0
        assert ("nothing to do" in capsys.readouterr().out) == said


def test_a_mistake_ends_with_code_2_and_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("grow", "drop"):
        assert command(monkeypatch, Called(GrowError("ru has an expert already")), verb, "--languages", "ru") == 2
        said = capsys.readouterr().err
        assert "ru has an expert already" in said and "Traceback" not in said


def test_every_option_of_drop_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called()
    assert command(monkeypatch, called, "drop", "--languages", "az, sv,") == 0
    assert called.given == (["az", "sv"], [], False)
    assert command(monkeypatch, called, "drop", "--experts", "a,b", "--undo") == 0
    assert called.given == ([], ["a", "b"], True)
