"""Ranks that share the tokens of a sequence train as one rank that has them all."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY, run_module

from megaxelm.corpus.packing import pack
from megaxelm.corpus.sampling import Windows
from megaxelm.errors import TrainError
from megaxelm.model.config import DecoderConfig
from megaxelm.run import MARKER
from megaxelm.train.environment import free_port
from megaxelm.train.metrics import read_metrics
from megaxelm.train.ulysses import check_sequence_parallel, own_slice


def train(run: Path, *overrides: str, ranks: int, stage: int) -> subprocess.CompletedProcess[str]:
    config = run.parent / f"zero{stage}.json"
    base = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    config.write_text(json.dumps(base | {"zero_optimization": {"stage": stage}}))
    start = ["megaxelm.train"]
    if ranks > 1:
        start = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module", "megaxelm.train"]
    sets = [part for override in overrides for part in ("--set", override)]
    return run_module(*start, str(run), "--expert", "seed", "--deepspeed_config", str(config), *sets)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_that_share_each_sequence_give_the_losses_of_one(indexed_run: Path, stage: int) -> None:
    # Dropout on: its keys must follow the token and not the rank. Grouped queries: two heads for each key.
    model = ["model.dropout=0.1", "model.num_heads=4", "model.num_kv_heads=2", "train.steps=4", "train.evaluate_every=4"]
    found = []
    for ranks in (1, 2):
        done = train(indexed_run, *model, f"train.sequence_parallel={ranks}", ranks=ranks, stage=stage)
        assert (indexed_run / "experts" / "seed" / MARKER).exists(), done.stdout[-3000:] + done.stderr[-3000:]
        found.append(read_metrics(indexed_run / "experts" / "seed" / "metrics.jsonl"))
        (indexed_run / "experts" / "seed").rename(indexed_run / f"seed-{ranks}")
    alone, shared = found
    assert [line["loss"] for line in shared] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert [line["grad_norm"] for line in shared] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-4)
    for one, two in zip(alone, shared, strict=True):
        assert two["loss_by_language"] == pytest.approx(one["loss_by_language"], rel=1e-4)
        assert two["attended_tokens"] == one["attended_tokens"] and two["tokens"] == one["tokens"]
    assert shared[-1]["evaluation_bits_per_byte"] == pytest.approx(alone[-1]["evaluation_bits_per_byte"], rel=1e-4)
    assert alone[-1]["loss"] < alone[0]["loss"]


def test_a_slice_has_its_own_tokens_and_the_documents_of_all() -> None:
    tokens = torch.arange(18).view(2, 9).numpy()
    windows = Windows(
        tokens, torch.tensor([0, 0, 1]).numpy(), torch.tensor([0, 3, 0]).numpy(), ("en", "sw"), torch.tensor([6, 7]).numpy(), None
    )
    batch = pack(windows, document_mask=True)
    parts = [own_slice(batch, rank, 4) for rank in range(4)]
    for name in ("tokens", "labels", "positions", "sample_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.num_targets for part in parts) == batch.num_targets == 15
    assert all(torch.equal(part.cu_seqlens, batch.cu_seqlens) and part.first_sample == 6 for part in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 3}, "ranks = 3"),
        ({"heads": 3}, "model.num_heads = 3"),
        ({"kv_heads": 1}, "model.num_kv_heads = 1"),
        ({"length": 33}, "train.sequence_length = 33"),
        ({"attention_dropout": 0.1}, "each rank would draw for other heads"),
    ],
)
def test_what_cannot_be_shared_is_told(changes: dict, message: str) -> None:
    values = {"ranks": 4, "heads": 4, "kv_heads": 2, "length": 32, "attention_dropout": 0.0} | changes
    config = DecoderConfig.__new__(DecoderConfig)
    for name, value in (("num_heads", "heads"), ("num_kv_heads", "kv_heads"), ("attention_dropout", "attention_dropout")):
        object.__setattr__(config, name, values[value])
    with pytest.raises(TrainError, match=message):
        check_sequence_parallel(2, values["ranks"], config, values["length"])
