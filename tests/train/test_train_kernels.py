"""Training by Triton's kernels, in the interpreter, under DeepSpeed: the loss curve of training by torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import REPOSITORY, run_module

from megaxelm.errors import TrainError
from megaxelm.model.config import config_from_recipe
from megaxelm.recipe import ModelConfig, TrainConfig
from megaxelm.train.environment import free_port
from megaxelm.train.forward import forward_options
from megaxelm.train.metrics import read_metrics
from megaxelm_kernels import backend

pytest.importorskip("triton", reason="triton is not installed")


def options(precision: str = "bf16", **train: object) -> dict[str, Any]:
    model = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    config = TrainConfig.model_validate({"steps": 1, "lr": 1e-3, "precision": precision, **train})
    return forward_options(config, config_from_recipe(model, 50, 0, 1, 2), torch.device("cpu"))


def test_auto_is_settled_and_what_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options() == {"attention": "sdpa", "kernels": "torch", "loss_chunk_rows": None}
    assert options(kernels="triton")["kernels"] == "triton", "by the interpreter"
    with pytest.raises(TrainError, match=r"train.kernels = triton with train.compile = true"):
        options(kernels="triton", compile=True)
    with pytest.raises(TrainError, match=r"train.attention = flash2: .* choose auto or sdpa"):
        options(attention="flash2")
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    with pytest.raises(TrainError, match=r"train.kernels = triton: works on CUDA, this is cpu; choose auto or torch"):
        options(kernels="triton")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_by_the_kernels_have_the_losses_of_torch(indexed_run: Path, stage: int) -> None:
    """With gradient accumulation, recomputed layers and, in stage 3, weights that only their own module has."""
    config = indexed_run / "config.json"
    base = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    config.write_text(json.dumps(base | {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    settings = ["train.steps=3", "train.precision=fp32", "train.micro_batch_size=2", "train.activation_checkpointing=full"]
    curves, choices = [], []
    for kernels in ("triton", "torch"):
        start = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "megaxelm.train"]
        sets = [part for item in (*settings, f"train.kernels={kernels}") for part in ("--set", item)]
        options = ["--expert", "seed", "--deepspeed_config", str(config), *sets]
        done = run_module(*start, str(indexed_run), *options, timeout=600, TRITON_INTERPRET=str(int(kernels == "triton")))
        folder = indexed_run / "experts" / "seed"
        assert done.returncode == 0 and (folder / "export").exists(), done.stdout[-2000:] + done.stderr[-2000:]
        curves.append([line["loss"] for line in read_metrics(folder / "metrics.jsonl")])
        choices.append(json.loads((folder / "choices.json").read_text())["kernels"])
        folder.rename(indexed_run / f"by_{kernels}")
    assert choices == ["triton", "torch"]
    assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-5)
