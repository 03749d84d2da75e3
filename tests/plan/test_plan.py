"""The plan: what it counts, what it chooses, what it says; and its memory against what processes really held."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import run_module

from megaxelm.errors import RecipeError, TrainError
from megaxelm.model.config import DecoderConfig, config_from_recipe, num_parameters
from megaxelm.model.decoder import Decoder
from megaxelm.plan.choose import CONFIGS, choose, options, parse_bytes
from megaxelm.plan.memory import Memory, Work, activations, layer_activations, padded_parameters, plan_memory
from megaxelm.plan.table import Hardware, make_plan, recipe_lines, speed
from megaxelm.recipe import ModelConfig, Recipe, parse_recipe
from megaxelm.train.ds_config import find_ds_config, read_ds_config
from megaxelm.train.environment import free_port
from megaxelm.train.shape import model_shape

GB = 10**9
TREE: dict[str, Any] = {
    "name": "planned",
    "corpus": {"train": "x", "languages": ["en", "de"]},
    "clusters": {"k": 4},
    "tokenizer": {"vocab_size": 32000},
    "model": {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "intermediate_size": 5504, "max_positions": 2048},
    "train": {"sequence_length": 2048, "batch_sequences": 64, "steps": 1000, "lr": 1e-4},
}
WORK = Work(micro_batch_size=1, sequence_length=2048, checkpoint_every=0, loss_chunk_rows=1024, precision="bf16")


def recipe(**train: Any) -> Recipe:
    return parse_recipe(TREE | {"train": TREE["train"] | train})


def shape() -> DecoderConfig:
    return model_shape(recipe())


def planned(name: str, devices: int, work: Work = WORK, cuda: bool = True) -> Memory:
    return plan_memory(shape(), read_ds_config(find_ds_config(name)), devices, work, cuda)


@pytest.mark.parametrize("family", ["llama", "xglm", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_module(family: str, tied: bool) -> None:
    model = ModelConfig(family=family, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, tie_embeddings=tied)
    config = config_from_recipe(model, 200, 0, 1, 2)
    assert padded_parameters(config) == sum(parameter.numel() for parameter in Decoder(config).parameters())
    assert padded_parameters(config) - num_parameters(config) == (1 if tied else 2) * 56 * 32


@pytest.mark.parametrize(("name", "lasting"), [("zero1", 2 + 12 / 8), ("zero2", 2 + 12 / 8), ("zero3-offload", 0.0)])
def test_what_lasts_is_divided_as_the_stage_says(name: str, lasting: float) -> None:
    memory, parameters = planned(name, 8), padded_parameters(shape())
    if name == "zero3-offload":
        assert memory.optimizer == 0 and memory.host == pytest.approx(parameters / 8 * (12 + 4 + 2 + 2))
    else:
        assert memory.weights + memory.optimizer == pytest.approx(lasting * parameters)
        assert memory.host == 0


def test_more_devices_need_less_and_more_work_needs_more() -> None:
    for name in CONFIGS:
        few, many = (planned(name, devices).total + planned(name, devices).host for devices in (2, 16))
        assert many <= few and (many < few or name == "zero0"), name
    work = replace(WORK, micro_batch_size=8)
    assert planned("zero1", 8, work).activations == pytest.approx(8 * planned("zero1", 8).activations)
    assert planned("zero1", 8, replace(work, checkpoint_every=1)).total < planned("zero1", 8, replace(work, checkpoint_every=2)).total
    assert planned("zero1", 8, replace(work, checkpoint_every=2)).total < planned("zero1", 8, work).total


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "xglm", "qwen3"])
def test_activations_are_what_autograd_keeps(family: str, kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    model = ModelConfig(family=family, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=160, max_positions=256)
    config = config_from_recipe(model, 256, 0, 1, 2)
    decoder = Decoder(config).bfloat16().train()
    length = 256
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.randint(0, 256, (length,))
        hidden = decoder(tokens, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), kernels=kernels)
    work = replace(WORK, sequence_length=length, kernels=kernels)
    assert activations(config, work) == pytest.approx(sum(kept.values()), rel=0.15 if kernels == "torch" else 0.05)
    assert hidden.requires_grad and layer_activations(config, work) * 3 < activations(config, work)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * GB), ("80gib", 80 * 2**30), ("40000 MB", 40 * GB), ("0.5T", GB * 500), ("1000", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "0GB", "80 apples", "-3GB", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(TrainError, match="--gpu-memory .*for example 80GB"):
        parse_bytes(text, "--gpu-memory")


def test_the_choice_fits_and_changes_with_the_memory() -> None:
    chosen = [choose(options(recipe(), shape(), 8, size * GB, CONFIGS)) for size in (140, 24, 10, 1)]
    assert chosen[0] is not None and chosen[0].config in ("zero0", "zero1") and chosen[0].activation_checkpointing == "none"
    assert chosen[1] is not None and chosen[1].memory.total < 24 * GB
    assert chosen[2] is not None and chosen[2].activation_checkpointing == "full" and chosen[2].memory.total < 10 * GB
    assert chosen[3] is None


def test_the_lines_to_paste_are_a_recipe_that_trains_so() -> None:
    hardware = Hardware(8, 2, 24 * GB)
    best = choose(options(recipe(), shape(), hardware.devices, hardware.memory, CONFIGS))
    assert best is not None
    pasted = recipe(**yaml.safe_load("\n".join(recipe_lines(best, hardware))))
    assert pasted.train.deepspeed_config == best.config and pasted.train.num_devices == 8


def test_devices_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(RecipeError, match="train.batch_sequences = 64 cannot be shared by 24 devices: choose 72"):
        options(recipe(), shape(), 24, 80 * GB, CONFIGS)


def test_time_and_cost_follow_from_the_speed() -> None:
    plan = make_plan(recipe(), shape(), Hardware(8, 1, 80 * GB), 1e6, "stated", 2.0)
    assert plan["tokens"] == 3 * 64 * 2048 * 1000, "the seed, the dense model, and the experts together"
    assert plan["time"]["seconds"] == plan["tokens"] / 1e6
    assert plan["time"]["cost"] == pytest.approx(plan["tokens"] / 1e6 / 3600 * 8 * 2.0)
    assert "time" not in make_plan(recipe(), shape(), Hardware(8, 1, 80 * GB), None, "unknown", None)


def test_speed_is_stated_measured_or_a_share_of_the_peak(tmp_path: Path) -> None:
    lines = [{"step": step, "tokens_per_second_per_device": value} for step, value in enumerate((1.0, 5.0, 3.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert speed(shape(), recipe(), 8, 7.0, None, None, None) == (7.0, "stated")
    assert speed(shape(), recipe(), 8, None, tmp_path, None, None)[0] == 24.0
    share, said = speed(shape(), recipe(), 2, None, None, 0.5, "H100 PCIe")
    assert said == "50% of 756 TFLOP/s on 2 devices"
    assert share == pytest.approx(756e12 / (6 * 1.28e9 + 12 * 24 * 2048 * 1024.5), rel=0.02)
    with pytest.raises(TrainError, match="--speed and --mfu each say"):
        speed(shape(), recipe(), 8, 7.0, None, 0.4, "H100")
    with pytest.raises(TrainError, match="--device one of A100.*or set train.peak_tflops"):
        speed(shape(), recipe(), 8, None, None, 0.4, "abacus")
    with pytest.raises(TrainError, match="no metrics.jsonl with speeds"):
        speed(shape(), recipe(), 8, None, tmp_path / "nothing", None, None)


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TREE))
    arguments = ["megaxelm.cli", "plan", str(file), "--gpus", "8", "--gpu-memory", "80GB", "--mfu", "0.4", "--device", "H200"]
    done = run_module(*arguments, "--price", "3")
    assert done.returncode == 0, done.stderr
    for words in ("zero3-offload", "deepspeed_config: zero", "131,072 tokens a step", "device hours", "at the stated price"):
        assert words in done.stdout
    made = json.loads(run_module(*arguments, "--json").stdout)
    assert made["choice"]["fits"] and made["speed"]["tokens_per_second"] > 0
    done = run_module(*arguments[:6], "80 apples")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "for example 80GB" in done.stderr


LARGE = TREE | {
    "tokenizer": {"vocab_size": 8192},
    "model": {"hidden_size": 1024, "num_layers": 16, "num_heads": 16, "intermediate_size": 2816, "max_positions": 512},
    "train": {"sequence_length": 16, "batch_sequences": 2, "micro_batch_size": 1, "precision": "bf16"},  # few tokens: a CPU may emulate it
    "clusters": {"k": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_planned_memory_is_what_two_ranks_hold(tmp_path: Path, stage: int) -> None:
    """Peak resident memory of the fuller rank less what it held after its imports, on a model of 214 million parameters.

    Larger pieces come straight from the system and go back to it, so that what is resident is what is in use.
    """
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(LARGE))
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    output = tmp_path / "result.json"
    worker = ["megaxelm.train.bench_worker", str(file), "--steps", "1", "--output", str(output)]
    worker += ["--set", f"train.deepspeed_config=zero{stage}"]
    done = run_module(*launcher, *worker, timeout=600, MALLOC_MMAP_THRESHOLD_="1000000", OMP_NUM_THREADS="1")
    assert output.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(output.read_text())
    measured = result["memory"]["peak_resident"] - result["before"]["resident"]
    config = model_shape(parse_recipe(LARGE))
    assert num_parameters(config) > 200_000_000
    work = Work(1, LARGE["train"]["sequence_length"], 0, 1024, "bf16")
    plan = plan_memory(config, read_ds_config(find_ds_config(f"zero{stage}")), 2, work, cuda=False)
    assert plan.total == pytest.approx(measured, rel=0.15)
