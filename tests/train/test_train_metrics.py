"""What `metrics.jsonl` says of languages, and how they are mixed by given weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.errors import RecipeError
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.train.checkpoint import Checkpoints
from megaxelm.train.loop import Loop, language_tokens
from megaxelm.train.members import check_language_weights, member_settings, plan_members
from megaxelm.train.metrics import Metrics, read_metrics
from megaxelm.train.steps import StepResult

SIZES = {"en": 4000, "sw": 700, "ur": 30}


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Blend:
    folder = tmp_path_factory.mktemp("index")
    for language, size in SIZES.items():
        with TokenIndexWriter(folder / language, 10) as writer:
            writer.add(np.ones(size, np.int64))
    return Blend({language: [TokenIndex(folder / language)] for language in SIZES}, 16, 1.0, 0)


def recipe(**train: Any) -> Recipe:
    return parse_recipe({"name": "tiny", "corpus": {"train": "x.jsonl"}, "clusters": {"k": 4}, "train": train})


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(0, 3000))
def test_the_tokens_of_each_language_are_those_that_were_read(blend: Blend, samples: int) -> None:
    tokens = language_tokens(blend, samples)
    assert sum(tokens.values()) == 16 * samples
    languages = blend.read(0, samples).languages if samples else ()
    assert tokens == {language: 16 * languages.count(language) for language in SIZES}


class FakeSteps:
    """Steps that train nothing."""

    def __init__(self, blend: Blend) -> None:
        self.blend = blend
        self.engine = SimpleNamespace(skipped_steps=0)
        self.languages = sorted(blend.streams)
        self.meter = None

    def run(self, step: int) -> StepResult:
        return StepResult(1, 0.1, None, torch.ones(len(self.languages), 2, dtype=torch.float64), True)


def write_metrics(blend: Blend, folder: Path, first: int, last: int) -> None:
    """The loop of a training from step `first` on, up to `last`, without a model."""
    member = SimpleNamespace(steps=9, batch_sequences=8, sequence_length=16)
    setting: Any = SimpleNamespace(
        member=member,
        recipe=SimpleNamespace(train=SimpleNamespace(log_every=2, checkpoint_every=100)),
        processes=SimpleNamespace(world_size=1),
        device="cpu",
    )
    metrics = Metrics(folder, first)
    steps: Any = FakeSteps(blend)
    Loop(setting, steps, Checkpoints.__new__(Checkpoints), metrics, first).run(range(first, last))
    metrics.close()


def test_a_resumed_training_writes_the_same_tokens_by_language(blend: Blend, tmp_path: Path) -> None:
    for name, pieces in {"whole": [(0, 8)], "resumed": [(0, 5), (4, 8)]}.items():
        (tmp_path / name).mkdir()
        for first, last in pieces:
            write_metrics(blend, tmp_path / name, first, last)
    whole, resumed = (
        [line["language_tokens"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "resumed")
    )
    assert whole == resumed and len(whole) == 4
    for line in read_metrics(tmp_path / "whole" / "metrics.jsonl"):
        assert sum(line["language_tokens"].values()) == line["tokens"] == line["step"] * 8 * 16


def test_the_board_has_a_curve_for_each_language(blend: Blend, tmp_path: Path) -> None:
    write_metrics(blend, tmp_path, 0, 4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {f"train/language_tokens/{language}" for language in SIZES} <= set(board.Tags()["scalars"])
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["language_tokens"]
    assert board.Scalars("train/language_tokens/sw")[-1].value == last["sw"]


def test_given_weights_must_have_the_languages_of_the_corpus() -> None:
    check_language_weights(recipe(), ["en", "sw"])
    check_language_weights(recipe(language_weights={"en": 1, "sw": 2}), ["sw", "en"])
    with pytest.raises(RecipeError, match="no weight for sw, ur: every language"):
        check_language_weights(recipe(language_weights={"en": 1}), ["ur", "en", "sw"])
    with pytest.raises(RecipeError, match="a weight for swa, of which the corpus has no text: its languages are en, sw"):
        check_language_weights(recipe(language_weights={"en": 1, "sw": 1, "swa": 2}), ["en", "sw"])


def test_weights_and_an_exponent_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match=r"train\.language_alpha = 0\.5 and train\.language_weights"):
        plan_members(recipe(language_weights={"en": 1}, language_alpha=0.5), list("abcd"))
    plan_members(recipe(language_weights={"en": 1}), list("abcd"))
    plan_members(recipe(language_alpha=0.5), list("abcd"))


def test_what_is_trained_depends_on_the_weights() -> None:
    one, two = (recipe(language_weights={"en": weight}) for weight in (1, 2))
    assert member_settings(one, plan_members(one, list("abcd"))["a"]) != member_settings(two, plan_members(two, list("abcd"))["a"])
