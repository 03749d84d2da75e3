"""What a user sees of a mistake: one sentence that names the field or file and the way out, exit code 2, no traceback."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import REPOSITORY, load_tokenizer_of, run_module, tiny_recipe, write_corpus

from megaxelm.cli import app
from megaxelm.console import run_guarded
from megaxelm.run import RunFolder


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, in this process."""
    code = run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(write_corpus(tmp_path / "corpus", documents=30))))
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("corpus.train=nowhere/*.jsonl", ["nowhere/*.jsonl"]),
        ("corpus.languages=[en, de, xx]", ["xx", "corpus.languages"]),
        ("corpus.fields.text=body", ["body", "corpus.fields.text", "text"]),
        ("clusters.k=8", ["clusters.k", "8", "4"]),
        ("tokenizer.vocab_size=20000", ["tokenizer.vocab_size", "20000"]),
        ("tokenizer.load=nowhere", ["tokenizer.load", "nowhere"]),
        ("train.lrr=1", ["train.lrr", "did you mean `lr`"]),
    ],
)
def test_a_mistake_in_the_recipe(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    code, _, errors = command(capsys, "run", recipe, "--runs", tmp_path / "runs", "--until", "clusters", "--set", override)
    assert code == 2
    message = errors[errors.rindex("error: ") :]
    assert "Traceback" not in errors
    for word in words:
        assert word in message


def test_an_unknown_language_is_told_its_neighbours(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus" / "en.jsonl"
    corpus.write_text(corpus.read_text().replace('"language": "en"', '"language": "qqx"'))
    code, _, errors = command(capsys, "run", recipe, "--runs", tmp_path / "runs", "--until", "clusters")
    assert code == 2 and "qqx" in errors


def test_broken_lines_are_counted_and_above_the_share_they_stop_the_run(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus" / "en.jsonl"
    corpus.write_text(corpus.read_text() + '{"text": \n[]\n')
    arguments = ("run", recipe, "--runs", tmp_path / "runs", "--until", "corpus")
    code, _, errors = command(capsys, *arguments)
    assert code == 2 and "en.jsonl" in errors and "corpus.max_bad_share" in errors and "31" in errors
    code, _, _ = command(capsys, *arguments, "--set", "corpus.max_bad_share=0.2")
    assert code == 0
    assert '"broken"' in (tmp_path / "runs" / "tiny" / "corpus" / "manifest.json").read_text()


@pytest.mark.slow
def test_a_damaged_index_is_found(capsys: pytest.CaptureFixture[str], indexed_run: Path) -> None:
    assert command(capsys, "index", "verify", indexed_run)[0] == 0
    path = next((indexed_run / "index").glob("*/en.bin"))
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    code, _, errors = command(capsys, "index", "verify", indexed_run)
    assert code == 2 and "en.bin: changed since it was written" in errors
    path.write_bytes(content[:-2])
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "seed")
    assert done.returncode == 2 and "en" in done.stderr and "error: " in done.stderr and "Traceback" not in done.stderr


def test_verbs_that_use_a_run_want_one(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for verb in (["train"], ["evaluate"], ["report"], ["export", "--expert", "seed", "--output", tmp_path / "x"], ["cluster", "show"]):
        code, _, errors = command(capsys, *verb, tmp_path / "empty")
        assert code == 2 and "not a run directory" in errors, verb
    code, _, errors = command(capsys, "train", recipe, "--runs", tmp_path / "runs")
    assert code == 2 and "has not been run yet" in errors


@pytest.mark.slow
def test_a_seed_that_does_not_fit_the_tokenizer_is_refused(indexed_run: Path, tmp_path: Path) -> None:
    from megaxelm.model.config import config_from_recipe
    from megaxelm.model.decoder import Decoder
    from megaxelm.model.hub import save_pretrained

    model = Decoder(config_from_recipe(RunFolder(indexed_run).recipe().model, 100, 1, 2, 3))
    model.initialise(0)
    save_pretrained(model, tmp_path / "small")
    shutil.copytree(indexed_run / "tokenizer", tmp_path / "tokenizer")
    load_tokenizer_of(indexed_run, tmp_path / "tokenizer")
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "seed", "--set", f"seed.load={tmp_path / 'small'}")
    assert done.returncode == 2
    assert (
        "its vocabulary has 100 entries, the tokenizer" in done.stderr
        and "tokenizer.load" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_full_disk_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    assert run_guarded(fill) == 2
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "runs/x/.locks/run"), "runs/x/.locks/run: permission denied"),
        (NotADirectoryError(20, "Not a directory", "runs/file/x"), "runs/file/x: not a directory"),
        (Exception("No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 3840 vs 3732"), "the disk is full"),
    ],
)
def test_trouble_with_files_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str], error: Exception, words: str) -> None:
    def fail() -> None:
        raise error

    assert run_guarded(fail) == 2
    assert words in capsys.readouterr().err


def test_a_defect_of_the_program_keeps_its_traceback() -> None:
    def fail() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_guarded(fail)


VERIFY = ["index", "verify"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff\x00{"], ids=repr)
@pytest.mark.parametrize(
    ("file", "verb"),
    [
        ("clusters/report.json", ["cluster", "show"]),
        ("index/manifest.json", VERIFY),
        ("corpus/manifest.json", "tokenizer"),
        ("corpus/stage.json", "clusters"),
        ("tokenizer/megaxelm_tokenizer.json", "tokens"),
        ("corpus/kept/*.npy", "tokens"),
        ("tokens/manifest.json", "clusters"),
        ("clusters/report.json", "index"),
        ("clusters/assignment/*.npy", "index"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    capsys: pytest.CaptureFixture[str], indexed_run: Path, file: str, verb: str | list[str], content: bytes
) -> None:
    path = next(indexed_run.glob(file))
    path.write_bytes(content)
    if isinstance(verb, str):
        arguments = ["run", indexed_run / "recipe.yaml", "--runs", indexed_run.parent, "--only", verb]
    else:
        arguments = [*verb, indexed_run]
    code, _, errors = command(capsys, *arguments)
    assert code == 2 and path.name in errors and "Traceback" not in errors, errors


def test_damaged_documents_are_named(capsys: pytest.CaptureFixture[str], indexed_run: Path) -> None:
    (indexed_run / "corpus" / "sample" / "en.jsonl").write_bytes(b'{"text": "a", "id"')
    arguments = ("run", indexed_run / "recipe.yaml", "--runs", indexed_run.parent, "--only", "clusters")
    code, _, errors = command(capsys, *arguments)
    assert code == 2 and "en.jsonl: missing or damaged" in errors and "--from corpus" in errors


def test_recipe_verbs(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    code, shown, _ = command(capsys, "recipe", "show", recipe, "--set", "train.lr=2e-3")
    assert code == 0 and yaml.safe_load(shown)["train"]["lr"] == 2e-3 and yaml.safe_load(shown)["train"]["beta2"] == 0.95
    code, shown, _ = command(capsys, "recipe", "check", REPOSITORY / "recipes" / "xglm-1.7b-16lang.yaml")
    assert code == 0 and "dense 10,485,760,000; 8 experts x 1,310,720,000 = 10,485,760,000 (equal)" in shown


def test_the_installed_command_works_like_the_module() -> None:
    script = Path(sys.executable).with_name("megaxelm")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "cluster", "donors", "sv"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("sv: "), done.stderr


def test_donors_are_relatives(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = command(capsys, "cluster", "donors", "pl", "sv")
    assert code == 0
    lines = dict(line.split(": ", 1) for line in shown.splitlines())
    assert lines["pl"].split()[0] in ("ru", "bg") and lines["sv"].split()[0] in ("de", "en")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process groups are looked up in /proc")
def test_a_training_keeps_others_away_and_ends_with_its_run(indexed_run: Path) -> None:
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    sets = ["--set", "train.steps=5000", "--set", "train.checkpoint_every=5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megaxelm.cli", "train", str(indexed_run), "--expert", "seed", *sets],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = indexed_run / "experts" / "seed" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert metrics.exists() and len(children) == 1
    other = run_module("megaxelm.train", str(indexed_run), "--expert", "seed", "--set", "train.steps=3")
    assert other.returncode == 2 and "another megaxelm works here" in other.stderr, "two trainings of one model do not mix"
    assert not (indexed_run / "replaced").exists()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and "`seed` was stopped and has saved its state" in errors, errors
    assert not Path(f"/proc/{children[0]}").exists()
