"""DeepSpeed's ZeRO stages give the loss curve of a plain torch loop, and a killed run goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY, run_module

from megaxelm.corpus.index_folder import open_streams
from megaxelm.corpus.packing import pack
from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained
from megaxelm.run import MARKER, RunFolder
from megaxelm.train.environment import free_port
from megaxelm.train.members import plan_members
from megaxelm.train.metrics import read_metrics
from megaxelm.train.schedule import learning_rate


def plain_torch(run: Path) -> tuple[list[float], Decoder]:
    """The seed's training written as one would without DeepSpeed: whole batch, one process, fp32."""
    recipe = RunFolder(run).recipe()
    config, member = recipe.train, plan_members(recipe, ["x", "y"])["seed"]
    tokenizer = Tokenizer.load(run / "tokenizer")
    model = Decoder(config_from_recipe(recipe.model, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.pad_token_id))
    model.initialise(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)
    blend = Blend(open_streams(run / "index"), member.sequence_length, member.language_alpha, config.seed)
    losses = []
    for step in range(member.steps):
        first = step * member.batch_sequences
        batch = pack(blend.read(first, member.batch_sequences), config.document_mask)
        optimizer.zero_grad()
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)
        loss = torch.nn.functional.cross_entropy(model.logits(hidden).float(), batch.labels, ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        optimizer.param_groups[0]["lr"] = learning_rate(member, step)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def losses_of(run: Path, expert: str) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "experts" / expert / "metrics.jsonl")]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_of_each_zero_stage_give_the_loss_curve_of_plain_torch(indexed_run: Path, stage: int) -> None:
    port = free_port()
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port), "--module", "megaxelm.train"]
    done = run_module(
        *launcher, str(indexed_run), "--expert", "seed", "--deepspeed_config", str(REPOSITORY / f"ds_configs/zero{stage}.json")
    )
    assert (indexed_run / "experts" / "seed" / MARKER).exists(), done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")), "shared memory that no process has any more"
    expected, model = plain_torch(indexed_run)
    assert losses_of(indexed_run, "seed") == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.3, "the curve must move for the comparison to mean something"
    exported = load_pretrained(indexed_run / "experts" / "seed" / "export")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            exported.get_parameter(name)[: model.config.vocab_size], parameter[: model.config.vocab_size], atol=2e-4, rtol=0
        )


def start_training(run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "megaxelm.train", str(run), "--expert", "seed", *sets],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_with_the_same_losses(indexed_run: Path, tmp_path: Path) -> None:
    settings = ("train.steps=40", "train.checkpoint_every=4", "model.dropout=0.1", "train.precision=bf16")
    metrics = indexed_run / "experts" / "seed" / "metrics.jsonl"
    process = start_training(indexed_run, *settings)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 10):
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (indexed_run / "experts" / "seed" / MARKER).exists()

    assert start_training(indexed_run, *settings).wait(timeout=120) == 0
    resumed = losses_of(indexed_run, "seed")
    assert len(resumed) == 40
    assert '"resumed_from_step": 0' not in (indexed_run / "experts" / "seed" / "choices.json").read_text()

    (indexed_run / "experts" / "seed").rename(tmp_path / "interrupted")
    assert start_training(indexed_run, *settings).wait(timeout=120) == 0
    assert losses_of(indexed_run, "seed") == resumed


def test_training_says_what_is_missing_before_it_starts(indexed_run: Path) -> None:
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "bg-en")
    assert done.returncode == 2
    assert "branches from `seed`, which is missing" in done.stderr and "Traceback" not in done.stderr
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "nobody")
    assert done.returncode == 2 and "this run has seed, dense, " in done.stderr
