import json
from pathlib import Path

import pytest

from megaxelm.errors import TrainError
from megaxelm.recipe import parse_recipe
from megaxelm.train import ds_keys
from megaxelm.train.ds_config import fill_ds_config, find_ds_config, micro_batch
from megaxelm.train.environment import find_processes
from megaxelm.train.members import plan_members

RECIPE = parse_recipe(
    {
        "name": "t",
        "corpus": {"train": "x"},
        "clusters": {"k": 2},
        "train": {"batch_sequences": 24, "micro_batch_size": 4, "gradient_clipping": 0.5, "precision": "bf16"},
    }
)
DENSE = plan_members(RECIPE, ["a", "b"])["dense"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_values_are_filled_from_the_recipe(stage: int) -> None:
    config = fill_ds_config(find_ds_config(f"zero{stage}"), RECIPE.train, DENSE, world_size=4, cuda=False)
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4 == 24
    assert config["train_micro_batch_size_per_gpu"] == 3  # the largest divisor of 6 that is at most 4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.0, "torch_adam": True}


def write(folder: Path, config: object) -> Path:
    path = folder / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "fp16", "long-context"])
def test_every_configuration_that_comes_with_the_project_can_be_filled(name: str) -> None:
    train = RECIPE.train.model_copy(update={"activation_checkpointing": "full"})
    config = fill_ds_config(find_ds_config(name), train, DENSE, world_size=2, cuda=False)
    assert config["optimizer"]["params"]["torch_adam"] == ("offload" not in name), "offload needs DeepSpeed's own CPU Adam"
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def test_fp16_is_filled_from_the_recipe_and_refused_on_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    train = RECIPE.train.model_copy(update={"precision": "fp16"})
    config = fill_ds_config(find_ds_config("fp16"), train, DENSE, world_size=2, cuda=True)
    assert config["fp16"]["enabled"] and config["fp16"]["loss_scale"] == 0 and not config["bf16"]["enabled"]
    import torch

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(TrainError, match="train.precision = fp16: this CPU has no half-precision arithmetic; choose bf16 or fp32"):
        fill_ds_config(find_ds_config("fp16"), train, DENSE, world_size=2, cuda=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation.*did you mean `zero_optimization`"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_sise": 5}}, "`reduce_bucket_sise` in `zero_optimization`; did you mean"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            "`pin_memry` in `zero_optimization.offload_optimizer`; did you mean `pin_memory`",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "`learning_rate` in `optimizer.params`"),
        ({"activation_checkpointing": {"partition_activation": True}}, "did you mean `partition_activations`"),
        ({"flops_profiler": {"enable": True}}, "`enable` in `flops_profiler`; did you mean `enabled`"),
        ({"aio": {"block_sise": 1}}, "`block_sise` in `aio`; did you mean `block_size`"),
        ({"checkpoint": {"writer": {"typ": "FAST"}}}, "`typ` in `checkpoint.writer`; did you mean `type`"),
        ({"wandb": {"enabled": True, "grupp": "x"}}, "`grupp` in `wandb`; did you mean `group`"),
        ({"timers": {"throughput": {"enable": True}}}, "`enable` in `timers.throughput`"),
        ({"tensor_parallel": {"autotp_size": 2}}, "take out `tensor_parallel`: AutoTP's checkpoints cannot be"),
        ({"sequence_parallel_size": 2}, "take out `sequence_parallel_size`.*train.sequence_parallel"),
        ({"elasticity": {"enabled": True}}, "`elasticity` was removed from DeepSpeed"),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload": True}},
            "`zero_optimization.cpu_offload` is deprecated.*write `offload_optimizer`",
        ),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage = 7: Input should be 0, 1, 2"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size = 'big'"),
        ({"zero_optimization": True}, "zero_optimization = True must be a section"),
        ({"gradient_clipping": "1"}, "gradient_clipping = '1' must be a number"),
        ({"steps_per_print": True}, "steps_per_print = True must be a whole number"),
        ({"fp16": {"enabled": False, "loss_scale": -1}}, "fp16.loss_scale = -1"),
        ({"train_batch_size": 32}, "train_batch_size = 32 contradicts the recipe, which makes it 24"),
        ({"train_micro_batch_size_per_gpu": 5}, "train_micro_batch_size_per_gpu = 5 contradicts the recipe, which makes it 4"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0 contradicts the recipe, which makes it 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled = False contradicts"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True contradicts"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type = Lion contradicts the recipe, which makes it AdamW"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "optimizer.params.weight_decay = 0.1 contradicts"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode = False does not fit"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op = sum does not fit.*write "mean"'),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "zero_optimization.compute_grad_norm = False does not fit"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "cannot be filled for zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param with stage = 2 would be ignored"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing.cpu_checkpointing = True would have no effect",
        ),
        ({"activation_checkpointing": {}}, "train.activation_checkpointing = none: set it to full"),
        ({"scheduler": {"type": "WarmupLR"}}, "take out `scheduler`"),
        ({"data_efficiency": {"enabled": True}}, "take out `data_efficiency`"),
        ('{"a": ', "not readable as JSON"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "`bf16` occurs twice"),
        ("[1]", "an object of keys and values"),
    ],
)
def test_a_wrong_configuration_is_an_error(tmp_path: Path, config: object, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        fill_ds_config(write(tmp_path, config), RECIPE.train, DENSE, world_size=1, cuda=False)


def test_what_deepspeed_has_is_accepted(tmp_path: Path) -> None:
    config = {
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5e8, "param_persistence_threshold": 1000},
        "checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": True}},
        "scheduler": {"enabled": False},
        "wandb": {"enabled": False, "project": "x"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},
    }
    filled = fill_ds_config(write(tmp_path, config), RECIPE.train, DENSE, world_size=1, cuda=False)
    assert filled["zero_optimization"]["stage3_max_live_parameters"] == 5e8


@pytest.mark.parametrize("key", sorted(ds_keys._MODELS))
def test_each_section_with_a_model_is_read_by_deepspeed_through_that_model(key: str) -> None:
    """The table says where DeepSpeed keeps its models: each is there, and refuses what it does not know."""
    with pytest.raises(ValueError):
        ds_keys._model(*ds_keys._MODELS[key])(no_such_key=1)


def test_ranks_that_cannot_share_the_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="24 sequences a step, which 5 ranks cannot share"):
        fill_ds_config(find_ds_config("zero1"), RECIPE.train, DENSE, world_size=5, cuda=False)


def test_an_unknown_configuration_is_told_the_names_there_are() -> None:
    with pytest.raises(TrainError, match="zero1, zero2, zero2-offload, zero3"):
        find_ds_config("zero9")


@pytest.mark.parametrize(("sequences", "at_most", "expected"), [(8, 8, 8), (8, 3, 2), (7, 4, 1), (12, 5, 4), (2, 100, 2)])
def test_micro_batch_divides_the_share_of_a_rank(sequences: int, at_most: int, expected: int) -> None:
    assert micro_batch(sequences, at_most) == expected


def test_a_lone_process_completes_its_environment() -> None:
    environment: dict[str, str] = {}
    assert find_processes(environment).world_size == 1
    assert environment["RANK"] == "0" and int(environment["MASTER_PORT"]) > 0


def test_a_launchers_environment_is_read() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    found = find_processes(environment)
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)


@pytest.mark.parametrize(
    "environment", [{"RANK": "0"}, {"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}]
)
def test_a_half_set_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(TrainError):
        find_processes(environment)
