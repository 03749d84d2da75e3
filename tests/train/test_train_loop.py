"""What a training does besides its steps: it skips, stops, evaluates, and shows where it hangs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import REPOSITORY, run_module

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.evaluate.perplexity import read_held_out
from megaxelm.model.hub import load_pretrained
from megaxelm.run import MARKER
from megaxelm.train import preemption
from megaxelm.train.environment import free_port
from megaxelm.train.finite import guard
from megaxelm.train.loop import Loop
from megaxelm.train.metrics import read_metrics
from megaxelm.train.steps import StepResult


def settings(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def train(run: Path, *overrides: str, ranks: int = 1, stage: int = 1) -> subprocess.CompletedProcess[str]:
    config = run.parent / f"zero{stage}.json"
    if not config.exists():
        base = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
        config.write_text(json.dumps(base | {"zero_optimization": {"stage": stage}}))
    start = ["megaxelm.train"]
    if ranks > 1:
        start = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module", "megaxelm.train"]
    return run_module(*start, str(run), "--expert", "seed", "--deepspeed_config", str(config), *settings(*overrides))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "experts" / "seed" / "metrics.jsonl")


@pytest.mark.slow
def test_losses_of_the_languages_add_up_to_the_loss(indexed_run: Path) -> None:
    done = train(indexed_run, "train.steps=3")
    assert done.returncode == 0, done.stderr
    for line in lines_of(indexed_run):
        losses = line["loss_by_language"]
        assert len(set(losses.values())) == len(losses) > 1
        assert min(losses.values()) < line["loss"] < max(losses.values())


# Stage 0 with a plain optimiser is ours to guard; 2 stands for DeepSpeed's own.
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(indexed_run: Path, tmp_path: Path, stage: int) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(
        """
import sys
from megaxelm.train import __main__ as entrance
from megaxelm.train.steps import Steps

run = Steps.run
def poisoned(self, step):
    if step == 2:
        self.engine.module.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
        self.hooked = self.engine.module.norm.weight._backward_hooks
    result = run(self, step)
    if step == 2:
        self.hooked.clear()
    return result
Steps.run = poisoned
sys.exit(entrance.main(sys.argv[1:]))
"""
    )
    config = tmp_path / "config.json"
    base = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    config.write_text(json.dumps(base | {"zero_optimization": {"stage": stage}}))
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    arguments = [
        str(indexed_run),
        "--expert",
        "seed",
        "--deepspeed_config",
        str(config),
        *settings("train.steps=5", "train.precision=fp32"),
    ]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "step 3, samples 16 to 23: the gradient is not finite; the step is skipped" in done.stdout
    lines = lines_of(indexed_run)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[2]["loss"] is None and all(math.isfinite(line["loss"]) for line in (lines[3], lines[4]))
    assert lines[4]["loss"] < lines[0]["loss"]
    assert [("grad_norm" in line) for line in lines] == [True, True, False, True, True], "a norm that is no number is not told"


def test_a_plain_optimiser_clips_once_and_tells_the_norm() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    engine: Any = SimpleNamespace(optimizer=optimizer, gradient_clipping=lambda: 1.0)
    guard(engine)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert optimizer._global_grad_norm == 5.0 and not optimizer.overflow  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    weight.grad = torch.tensor([math.inf, 0.0])
    optimizer.step()
    assert optimizer.overflow  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


@pytest.mark.slow
def test_evaluation_while_training_gives_the_bits_of_the_exported_model(indexed_run: Path) -> None:
    done = train(indexed_run, "train.steps=4", "train.evaluate_every=3", "train.log_every=100", "train.evaluate_documents=3")
    assert done.returncode == 0, done.stderr
    lines = lines_of(indexed_run)
    assert [line["step"] for line in lines] == [3, 4], "an evaluation makes a line of its own"
    scores = lines[-1]["evaluation_bits_per_byte"]
    model, tokenizer = load_pretrained(indexed_run / "experts" / "seed" / "export"), Tokenizer.load(indexed_run / "tokenizer")
    expected = {}
    folders = {language: indexed_run / "corpus" / "valid" for language in ("bg", "de", "en", "ru")}
    for language, held_out in read_held_out(folders, tokenizer, 3, 31).items():
        nats = 0.0
        for ids in held_out.ids:
            tokens = torch.tensor([tokenizer.start_id, *ids])
            hidden = model(tokens[:-1], torch.arange(len(ids)), torch.tensor([0, len(ids)]))
            nats += float(torch.nn.functional.cross_entropy(model.logits(hidden), tokens[1:], reduction="sum").detach())
        expected[language] = nats / math.log(2) / held_out.bytes
    assert scores == pytest.approx(expected | {"mean": sum(expected.values()) / 4}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_share_an_evaluation_that_does_not_share_out_evenly(indexed_run: Path, stage: int) -> None:
    found = []
    for ranks in (1, 2):
        done = train(indexed_run, "train.steps=2", "train.evaluate_every=1", "train.evaluate_documents=1", ranks=ranks, stage=stage)
        assert (indexed_run / "experts" / "seed" / MARKER).exists(), done.stdout + done.stderr
        found.append([line["evaluation_bits_per_byte"] for line in lines_of(indexed_run)])
        (indexed_run / "experts" / "seed").rename(indexed_run / f"seed-{ranks}")
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1][1] == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.slow
def test_compilation_under_zero_3_is_refused(indexed_run: Path) -> None:
    done = train(indexed_run, "train.compile=true", stage=3)
    assert done.returncode == 2 and "train.compile = true with ZeRO stage 3" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(indexed_run: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        done = train(indexed_run, "train.steps=3", f"train.compile={compiled}")
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in lines_of(indexed_run)])
        (indexed_run / "experts" / "seed").rename(indexed_run / f"seed-{compiled}")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def start(run: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-m", "megaxelm.train"]
    if ranks > 1:
        # launch.py itself: the outer program does not pass signals on.
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
        command += ["-m", "megaxelm.train"]
    return subprocess.Popen(
        [*command, str(run), "--expert", "seed", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def wait_for_lines(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "experts" / "seed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGUSR1", "SIGTERM", "the file stop"])
def test_a_training_that_is_asked_to_stop_saves_and_goes_on_exactly(indexed_run: Path, how: str) -> None:
    overrides = settings("train.steps=60", "train.checkpoint_every=1000", "model.dropout=0.1", "train.micro_batch_size=1")
    process = start(indexed_run, *overrides)
    wait_for_lines(indexed_run, 5, process)
    if how.startswith("SIG"):
        process.send_signal(getattr(signal, how))
    else:
        (indexed_run / "experts" / "seed" / "stop").touch()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "Traceback" not in output, output
    assert f"was stopped by {how} after step" in output and " s of 30 s" in output
    assert not (indexed_run / "experts" / "seed" / "stop").exists(), "the next start must go on"
    stopped = int((indexed_run / "experts" / "seed" / "checkpoints" / "latest").read_text())
    assert stopped == lines_of(indexed_run)[-1]["step"] < 60
    again = start(indexed_run, *overrides)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    resumed = [line["loss"] for line in lines_of(indexed_run)]
    (indexed_run / "experts" / "seed").rename(indexed_run / "stopped")
    whole = start(indexed_run, *overrides)
    assert whole.wait(timeout=120) == 0
    assert resumed == [line["loss"] for line in lines_of(indexed_run)]


@pytest.mark.slow
def test_one_rank_that_is_told_to_stop_stops_all_within_a_micro_batch_even_in_an_evaluation(indexed_run: Path, tmp_path: Path) -> None:
    (indexed_run / "experts" / "seed").mkdir(parents=True)
    process = start(indexed_run, *settings("train.steps=4000", "train.evaluate_every=1", "train.evaluate_documents=50"), ranks=2)
    wait_for_lines(indexed_run, 3, process)
    second = next(child for child in children(process.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes())
    os.kill(second, signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert output.count("was stopped by SIGUSR1 after step") == 2, output
    assert (indexed_run / "experts" / "seed" / "checkpoints" / "latest").exists()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] + [grandchild for child in found for grandchild in children(int(child))]


def test_signals_before_training_begins_are_not_lost() -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    preemption._caught.clear()
    try:
        preemption.catch_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.StopRequest(Path("/nowhere"), 0, 1).agree() == "SIGUSR1"
    finally:
        preemption._caught.clear()
        for number, handler in zip(preemption.SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_step_that_hangs_shows_its_stacks() -> None:
    code = """
import time
from megaxelm.train.watchdog import Watchdog
def hangs():
    time.sleep(1)
with Watchdog(0.2) as dog:
    dog.beat()
    hangs()
"""
    env = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode == 0 and "Timeout (0:00:00.2" in done.stderr and "in hangs" in done.stderr
    quick = code.replace("time.sleep(1)", "time.sleep(0.05)")
    done = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, env=env, timeout=30)
    assert done.stderr == ""


@pytest.mark.slow
def test_a_training_moves_its_optimiser_to_the_host_and_back(indexed_run: Path, tmp_path: Path) -> None:
    folder = indexed_run / "experts" / "seed"
    overrides = settings("train.steps=6", "train.micro_batch_size=8", "train.precision=fp32")
    said = []
    for config, last in (("zero2", 2), ("zero2-offload", 4), ("zero2", 6)):
        script = tmp_path / "stopped.py"
        script.write_text(
            f"""
import os, signal, sys
from megaxelm.train import __main__ as entrance
from megaxelm.train.steps import Steps

run = Steps.run
def stopped(self, step):
    result = run(self, step)
    if step + 1 == {last} < 6:
        os.kill(os.getpid(), signal.SIGUSR1)
    return result
Steps.run = stopped
sys.exit(entrance.main(sys.argv[1:]))
"""
        )
        arguments = [str(indexed_run), "--expert", "seed", "--deepspeed_config", config, *overrides]
        env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=env, timeout=900)
        assert done.returncode == (75 if last < 6 else 0), done.stdout + done.stderr
        said.append(done.stdout)
    assert "resumed from step 2, saved by 1 rank of ZeRO 2 in fp32; now 1 rank of ZeRO 2 in fp32, optimiser on the host" in said[1]
    assert "resumed from step 4, saved by 1 rank of ZeRO 2 in fp32, optimiser on the host; now 1 rank of ZeRO 2 in fp32" in said[2]
    moved = [line["loss"] for line in lines_of(indexed_run)]
    folder.rename(indexed_run / "moved")
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "seed", "--deepspeed_config", "zero2", *overrides)
    assert done.returncode == 0, done.stderr
    assert moved == pytest.approx([line["loss"] for line in lines_of(indexed_run)], rel=1e-5) and len(moved) == 6


def test_a_request_in_the_last_evaluation_does_not_lose_the_last_step() -> None:
    saved: list[int] = []
    steps = SimpleNamespace(
        languages=["en"],
        blend=SimpleNamespace(counts=lambda samples: {"en": samples}, sequence_length=4),
        engine=SimpleNamespace(skipped_steps=0),
        meter=None,
        run=lambda step: StepResult(8, 0.1, 1.0, torch.ones(1, 2, dtype=torch.float64), True),
    )
    config = SimpleNamespace(evaluate_every=2, checkpoint_every=100, log_every=1, grace_seconds=30.0)
    setting: Any = SimpleNamespace(
        member=SimpleNamespace(name="seed", steps=2, batch_sequences=2, sequence_length=4),
        recipe=SimpleNamespace(train=config),
        processes=SimpleNamespace(world_size=1),
        device="cpu",
        is_first=True,
    )
    lines: list[dict[str, Any]] = []
    checkpoints: Any = SimpleNamespace(save=lambda engine, progress: saved.append(progress.step) or 0.0)
    metrics: Any = SimpleNamespace(write=lines.append)
    asked = iter([None, "SIGTERM", "SIGTERM", "SIGTERM"])
    stop: Any = SimpleNamespace(agree=lambda: next(asked))
    held_out: Any = SimpleNamespace(score=lambda engine, watch: watch())
    loop = Loop(setting, steps, checkpoints, metrics, 0)  # type: ignore[arg-type]
    loop.run(range(2), stop, None, held_out)
    assert saved == [2] and [line["step"] for line in lines] == [1, 2]
