"""`megaxelm score` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_ensemble import write_byte_ensemble

from megaxelm.cli import app
from megaxelm.console import run_guarded


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, in this process."""
    code = run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_ensemble(tmp_path_factory.mktemp("run")).parent


def test_texts_and_files_in_one_table(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"text": "a dog ran", "language": "en"}\n' * 2)
    code, out, errors = command(capsys, "score", run, "--text", "the cat " * 20, "--file", tmp_path / "f.jsonl", "--router", "uniform")
    assert "score: router uniform, 3 of 3 experts, mixture, float32 on " in errors
    assert code == 0 and "mean weights: e0 0.33, e1 0.33, e2 0.33" in errors
    names = [line.split("  ")[-1] for line in out.splitlines()]
    assert names == ["text", "--text 1", "f.jsonl:1", "f.jsonl:2", "total"]
    assert out.splitlines()[-1].split()[:2] == ["178", "178"]


def test_figures_as_json(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("кот сидел на ковре " * 9)
    arguments = ("score", run / "ensemble", "--file", tmp_path / "f.txt", "--json", "--language", "ru", "--router", "language")
    found = json.loads(command(capsys, *arguments)[1])
    assert found["texts"][0]["language"] == "ru" and found["texts"][0]["weights"] == {"e0": 0.0, "e1": 1.0, "e2": 0.0}
    alone = json.loads(command(capsys, "score", run, "--file", tmp_path / "f.txt", "--json", "--expert", "e1")[1])
    assert alone["total"] == found["total"] and found["total"]["tokens"] == len(("кот сидел на ковре " * 9).encode())
    settings = {"router": "language", "top_m": 3, "combine": "mixture", "window": "the experts' positions"}
    assert found["settings"].items() >= settings.items() and found["settings"]["min_context"] == "half of the window"
    narrow = json.loads(command(capsys, *arguments, "--window", "16", "--min-context", "4")[1])
    assert narrow["total"]["log_likelihood"] != found["total"]["log_likelihood"]
    product = json.loads(command(capsys, "score", run, "--text", "кот", "--json", "--router", "uniform", "--combine", "logit_mean")[1])
    mixture = json.loads(command(capsys, "score", run, "--text", "кот", "--json", "--router", "uniform")[1])
    assert product["total"]["log_likelihood"] != mixture["total"]["log_likelihood"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to score"),
        (("--text", ""), "nothing to score"),
        (("--text", "a\udcff"), "not UTF-8 text"),
        (("--text", "a", "--router", "best"), "router = 'best'"),
        (("--text", "a", "--window", 65), "choose 1 to 64"),
        (("--file", "nowhere.jsonl"), "no such file"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str], run: Path, arguments: tuple[object, ...], words: str) -> None:
    code, _, errors = command(capsys, "score", run, *arguments)
    assert code == 2 and words in errors and "Traceback" not in errors
