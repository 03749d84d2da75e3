import json
from pathlib import Path

import pytest

from megaxelm.errors import TrainError
from megaxelm.recipe import parse_recipe
from megaxelm.train.ds_config import fill_ds_config, find_ds_config, micro_batch
from megaxelm.train.environment import find_processes
from megaxelm.train.members import plan_members

RECIPE = parse_recipe(
    {
        "name": "t",
        "corpus": {"train": "x"},
        "clusters": {"k": 2},
        "train": {"batch_sequences": 24, "micro_batch_size": 4, "gradient_clipping": 0.5},
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
    assert config["bf16"] == {"enabled": True}
    assert config["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.0, "torch_adam": True}


def write(folder: Path, config: object) -> Path:
    path = folder / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation.*did you mean `zero_optimization`"),
        ({"train_batch_size": 32}, "train_batch_size = 32 contradicts the recipe, which makes it 24"),
        ({"bf16": {"enabled": False}}, "bf16.enabled = False contradicts"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "cannot be filled for zero_optimization.reduce_bucket_size"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type = Lion"),
        ({"scheduler": {"type": "WarmupLR"}}, "take out `scheduler`"),
        ({"fp16": {"enabled": True}}, "take out `fp16`"),
        ('{"a": ', "not readable as JSON"),
    ],
)
def test_a_wrong_configuration_is_an_error(tmp_path: Path, config: object, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        fill_ds_config(write(tmp_path, config), RECIPE.train, DENSE, world_size=1, cuda=False)


def test_ranks_that_cannot_share_the_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="24 sequences a step, which 5 ranks cannot share"):
        fill_ds_config(find_ds_config("zero1"), RECIPE.train, DENSE, world_size=5, cuda=False)


def test_an_unknown_configuration_is_told_the_names_there_are() -> None:
    with pytest.raises(TrainError, match="zero1, zero2, zero3"):
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
