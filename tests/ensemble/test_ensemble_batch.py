"""Batches of texts: what a line may say, the order of the answers, and files that appear whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, scripted_text

from megaxelm.ensemble.batch import add_all, numbered, read_batch, record, whole_file, write_all
from megaxelm.ensemble.sampling import SamplingParams
from megaxelm.errors import RoutingError

EXPERTS = ["north", "south"]


def lines(*values: Any) -> list[bytes]:
    return [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]


def test_a_line_says_more_than_the_command() -> None:
    sampling = SamplingParams(max_new_tokens=9, temperature=0.5, seed=7)
    full = {"prompt": [70, 71], "id": {"my": 1}, "language": "sw", "top_k": 3, "top_p": 0.9, "min_p": 0.1, "temperature": 1, "stop": "."}
    items = read_batch(lines({"prompt": "a"}, b"  \n", full, {"prompt": "b", "stop": ["x", "y"], "seed": None}), "f", "de", sampling)
    assert [item.where for item in items] == ["f, line 1", "f, line 3", "f, line 4"]
    assert (items[0].request.prompt, items[0].request.language, items[0].request.sampling) == ("a", "de", sampling)
    assert items[1].given == {"prompt": [70, 71], "id": {"my": 1}}
    assert items[1].request.sampling == SamplingParams(9, 1.0, 3, 0.9, 0.1, 7, (".",))
    assert items[1].request.language == "sw"
    assert items[2].request.sampling.stop == ("x", "y") and items[2].request.sampling.seed == 7


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        ([1], "a JSON object is wanted"),
        ({}, "prompt: field required"),
        ({"prompt": 1}, "prompt: give a string"),
        ({"prompt": ["a"]}, "prompt: give a string"),
        ({"prompt": [True]}, "prompt: give a string"),
        ({"prompt": "a", "topp": 0.5}, "topp: no such field"),
        ({"prompt": "a", "top_p": "high"}, "top_p: input should be a valid number"),
        ({"prompt": "a", "top_p": 1.5}, "top_p = 1.5: choose above 0 up to 1"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens = 0: choose at least 1"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "max_new_tokens: input should be a valid integer"),
        ({"prompt": "a", "stop": [""]}, "stop"),
    ],
)
def test_a_bad_line_is_named_with_its_field(line: Any, words: str) -> None:
    with pytest.raises(RoutingError) as error:
        read_batch(lines({"prompt": "good"}, b"", line), "in.jsonl", None, SamplingParams())
    assert str(error.value).startswith("in.jsonl, line 3: ") and words in str(error.value)


def test_an_empty_batch_is_a_mistake() -> None:
    with pytest.raises(RoutingError, match="no line in it"):
        read_batch([b"\n"], "in.jsonl", None, SamplingParams())


def test_what_the_engine_refuses_is_named_before_anything_is_written() -> None:
    engine = ScriptedEngine()
    items = read_batch(lines({"prompt": "a"}, {"prompt": "b", "language": "klingon"}), "in.jsonl", None, SamplingParams())
    with pytest.raises(RoutingError, match="in.jsonl, line 2: .*klingon"):
        add_all(engine, items)
    assert engine.steps == 0


def test_answers_come_in_order_and_as_soon_as_they_can() -> None:
    engine = ScriptedEngine(max_batch=3)
    values = [{"prompt": str(number), "max_new_tokens": count} for number, count in enumerate([2, 9, 1, 3, 5, 1])]
    items = numbered(read_batch(lines(*values), "f", None, SamplingParams()))
    tokens: list[int] = []
    found, steps = [], []
    for number, result in write_all(engine, add_all(engine, items), EXPERTS, lambda number, event: tokens.append(number)):
        found.append((number, result.text))
        steps.append(engine.steps)
    assert found == [(number, scripted_text(value["prompt"], count=value["max_new_tokens"])) for number, value in enumerate(values)]
    assert steps == [2, 9, 9, 9, 9, 9] and engine.widest == 3
    assert len(tokens) == 21


def test_equal_prompts_are_drawn_apart_and_each_alike_wherever_it_stands() -> None:
    def draw(*prompts: Any) -> list[str]:
        engine = ScriptedEngine()
        items = numbered(read_batch(lines(*({"prompt": prompt} for prompt in prompts)), "f", None, SamplingParams(temperature=1.0)))
        return [result.text for _, result in write_all(engine, add_all(engine, items), EXPERTS)]

    assert len(set(draw("a", "a", "b", "a"))) == 4
    assert draw("a", "b", "a") == [*draw("a"), *draw("b"), draw("a", "a")[1]]


def test_a_record_has_the_line_the_text_and_the_weights() -> None:
    engine = ScriptedEngine()
    items = read_batch(lines({"prompt": "eos", "id": 5}), "f", None, SamplingParams())
    ((_, result),) = write_all(engine, add_all(engine, items), EXPERTS)
    plain = record(items[0], result)
    assert plain == {
        "prompt": "eos",
        "id": 5,
        "text": scripted_text("eos", count=3),
        "finish_reason": "stop",
        "num_tokens": 4,
        "logprob": -2.0,
        "mean_weights": {"north": 0.75, "south": 0.25},
    }
    full = record(items[0], result, with_weights=True)
    assert full["weights"] == [[0.75, 0.25]] * 4 and full["experts"] == EXPERTS and len(full["token_ids"]) == len(full["logprobs"]) == 4


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"] and path.read_bytes() == b"old"
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"] and path.read_bytes() == b"new"
