"""Engines of every ZeRO stage are filled with full tensors, and their checkpoints are read back, on one rank and on two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY

from megaxelm.errors import CheckpointError
from megaxelm.train.environment import free_port
from megaxelm.train.zero_state import CheckpointState


def run_ranks(script: str, ranks: int, *arguments: str) -> str:
    """Run a script of this folder on so many ranks; returns what rank 0 printed.

    The test fails with the output of all ranks when one of them ends with an error.
    """
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    path["PYTHONPATH"] = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels"))
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env=dict(os.environ) | common | path | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-6000:] for output in outputs)
    return outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_zero_stage_is_filled_steps_like_torch_and_is_read_back(ranks: int, tmp_path: Path) -> None:
    assert "filled all kinds" in run_ranks("fill_ranks.py", ranks, str(tmp_path))


def write_zero1(tag: Path, ranks: int = 2) -> None:
    """A ZeRO-1 checkpoint as DeepSpeed lays it out: weights 0..9, cut in two, with two numbers of padding at the end."""
    tag.mkdir(parents=True)
    full = torch.arange(12.0)
    model = {
        "module": {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4)},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{"a.weight": torch.Size([2, 3]), "b.weight": torch.Size([4])}],
        "shared_params": {},
        "mp_world_size": 1,
    }
    torch.save(model, tag / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        part = full[rank * 6 : rank * 6 + 6]
        adam = {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": part + 100, "exp_avg_sq": part + 200}},
            "param_groups": [{"params": [0]}],
        }
        state = {
            "base_optimizer_state": adam,
            "single_partition_of_fp32_groups": [part[:4] if rank else part],
            "partition_count": [2],
            "zero_stage": 1,
        }
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_partitions_are_joined_across_their_borders(tmp_path: Path) -> None:
    write_zero1(tmp_path / "5")
    state = CheckpointState.open(tmp_path / "5")
    assert state.names == ("a.weight", "b.weight") and state.optimizer_step == 5
    torch.testing.assert_close(state.weight("b.weight"), torch.arange(6.0, 10.0), rtol=0, atol=0)
    torch.testing.assert_close(state.moments("b.weight")["exp_avg_sq"], torch.arange(206.0, 210.0), rtol=0, atol=0)
    torch.testing.assert_close(state.weight("a.weight"), torch.arange(6.0).view(2, 3), rtol=0, atol=0)


def damage_missing(tag: Path) -> None:
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def damage_cut(tag: Path) -> None:
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-400])


def damage_mixed(tag: Path) -> None:
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [torch.zeros(3)]
    torch.save(content, path)


def damage_layout(tag: Path) -> None:
    path = tag / "mp_rank_00_model_states.pt"
    content = torch.load(path)
    del content["param_shapes"]
    torch.save(content, path)


def damage_parallel(tag: Path) -> None:
    path = tag / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path) | {"mp_world_size": 2}, path)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code of the file ran",))


def damage_code(tag: Path) -> None:
    torch.save({"module": Evil()}, tag / "mp_rank_00_model_states.pt")


def damage_all(tag: Path) -> None:
    for path in tag.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (damage_missing, "2 ranks wrote it, but 1 files of the optimiser are here"),
        (damage_cut, "zero_pp_rank_1_mp_rank_00_optim_states.pt: not readable as a DeepSpeed checkpoint"),
        (damage_mixed, "a group has 9 numbers, its parameters 10; files of different checkpoints are mixed"),
        (damage_layout, "not the layout of a ZeRO 0 to 3 checkpoint .KeyError: 'param_shapes'"),
        (damage_parallel, "tensor parallelism over 2 ranks"),
        (damage_code, "mp_rank_00_model_states.pt: not readable"),
        (damage_all, "no DeepSpeed checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_told_in_words(damage, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_zero1(tmp_path / "5")
    damage(tmp_path / "5")
    with pytest.raises(CheckpointError, match=text):
        CheckpointState.open(tmp_path / "5")
    assert "code of the file ran" not in capfd.readouterr().out
