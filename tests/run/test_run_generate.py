"""`megaxelm generate`: prompts and batches, streamed, as JSON, with weights."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from tiny_mixture import write_mixture

from megaxelm.cli import app
from megaxelm.console import run_guarded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture") / "tiny")


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `generate`, in this process."""
    code = run_guarded(lambda: app(["generate", *map(str, arguments)], standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SAMPLED = ("--max-new-tokens", 20, "--temperature", 1, "--seed", 5)
PROMPTS = ("--prompt", "one", "--prompt", "two", "--prompt", "one")


def test_the_text_and_its_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = command(capsys, run, "--prompt", "one", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("one") and errors == "  [3 tokens; mean weights: north 0.50, south 0.50]\n"
    code, with_weights, _ = command(capsys, run, "--prompt", "one", "--max-new-tokens", 3, "--weights")
    assert with_weights.startswith(out) and with_weights.count("north 0.50  south 0.50") == 3
    assert "south" not in command(capsys, run, "--prompt", "one", "--max-new-tokens", 3, "--weights", "--expert", "north")[1]


def test_in_a_terminal_the_weights_are_colours(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, _ = command(capsys, run, "--prompt", "one", "--max-new-tokens", 3, "--weights")
    assert "router uniform; mean weights: " in out and "■ north 0.50" in out and "■ south 0.50" in out


def test_a_stream_prints_what_is_printed_at_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, errors = command(capsys, run, *PROMPTS, *SAMPLED)
    assert command(capsys, run, *PROMPTS, *SAMPLED, "--stream") == (0, out, errors)


def test_json_and_batch_have_the_same_texts(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = command(capsys, run, *PROMPTS, *SAMPLED, "--json", "--weights")
    objects = [json.loads(line) for line in out.splitlines()]
    assert [value["prompt"] for value in objects] == ["one", "two", "one"] and objects[0]["text"] != objects[2]["text"]
    assert len(objects[0]["weights"]) == objects[0]["num_tokens"]
    plain = command(capsys, run, *PROMPTS, *SAMPLED)[1]
    assert plain == "".join(f"{value['prompt']}{value['text']}\n" for value in objects)
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "id": 2}\n{"prompt": "one"}\n')
    code, out, errors = command(
        capsys, run, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *SAMPLED, "--max-batch", 2
    )
    assert (code, out) == (0, "") and "3/3" in errors
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [value["text"] for value in written] == [value["text"] for value in objects]
    assert written[1]["id"] == 2 and "weights" not in written[1]


def test_a_batch_from_the_standard_input_to_the_standard_output(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "one", "max_new_tokens": 2}\n')))
    code, out, _ = command(capsys, run, "--batch", "-")
    assert code == 0 and json.loads(out)["num_tokens"] == 2


def test_sampling_options_arrive(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = command(capsys, run, "--prompt", "one", "--max-new-tokens", 12)[1]
    for option in (("--top-k", 1), ("--min-p", 0.999), ("--top-p", 1e-6)):
        assert command(capsys, run, "--prompt", "one", "--max-new-tokens", 12, "--temperature", 1, *option)[1] == greedy, option
    stop = greedy.strip("\n").removeprefix("one")[2]
    stopped = command(capsys, run, "--prompt", "one", "--max-new-tokens", 12, "--stop", stop)[1]
    assert stopped == f"one{greedy.removeprefix('one').split(stop)[0]}\n"
    logprobs = []
    for dtype in ("float32", "bfloat16"):
        code, out, _ = command(capsys, run, "--prompt", "one", "--max-new-tokens", 1, "--dtype", dtype, "--json")
        logprobs.append(json.loads(out)["logprob"])
    assert logprobs[0] != logprobs[1] and logprobs[0] == pytest.approx(logprobs[1], abs=0.5)


def test_a_draft_changes_nothing_greedy_and_is_accounted_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = command(capsys, run, *PROMPTS, "--max-new-tokens", 20)[1]
    code, out, errors = command(capsys, run, *PROMPTS, "--max-new-tokens", 20, "--draft", "north", "--draft-tokens", 3)
    assert (code, out) == (0, plain) and "proposed tokens accepted" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either --prompt or --batch"),
        (("--prompt", "x", "--batch", "-"), "leave one of the two out"),
        (("--prompt", "x", "--stream", "--json"), "--stream and --json"),
        (("--batch", "-", "--stream"), "--stream"),
        (("--batch", "-", "--json"), "--json"),
        (("--prompt", "x", "--output", "out"), "only with --batch"),
        (("--batch", "-", "--output", "no/such/out"), "no folder no/such"),
        (("--batch", "no.jsonl"), "no such file"),
        (("--prompt", "x\udcff"), "not UTF-8"),
        (("--prompt", "x", "--stop", "\udcff"), "--stop: not UTF-8"),
        (("--prompt", "x", "--stop", ""), "stop"),
        (("--prompt", "x", "--top-p", 0), "top_p = 0"),
        (("--prompt", "x", "--min-p", 1), "min_p = 1"),
        (("--prompt", "x", "--dtype", "int3"), "--dtype int3: choose one of float32, bfloat16"),
        (("--prompt", "x", "--device", "warp:9"), "--device warp:9"),
        (("--prompt", "x", "--router", "language", "--language", "xx"), "xx"),
        (("--prompt", "x", "--expert", "nobody"), "north, south"),
        (("--prompt", "x", "--draft", "nobody"), "north, south"),
        (("--prompt", "x", "--combine", "sum"), "mixture, logit_mean"),
        (("--prompt", "x" * 99), "96 positions"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], words: str) -> None:
    code, out, errors = command(capsys, run, *arguments)
    assert code == 2 and out == "" and errors.startswith("error: ") and words in errors and errors.count("\n") == 1


def test_a_bad_line_is_named_before_anything_runs(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "max_new_tokens": 999}\n')
    code, out, errors = command(capsys, run, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 2 and "in.jsonl, line 2: " in errors and "96 positions" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
