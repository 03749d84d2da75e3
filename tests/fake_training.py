"""Models that look trained: exports with a tensor each, made in no time, by the same checks as a real training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from megaxelm.errors import TrainError
from megaxelm.model.hub import weights_hash
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.train.launch import LaunchOptions
from megaxelm.train.members import Member


def write_export(folder: Path, value: float) -> str:
    """An export of one tensor; returns the hash of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((3,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return weights_hash(folder)


class FakeTraining:
    """Stands for `train_members`. `calls`: the names of each call; `failing`: those that are not trained."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failing: set[str] = set()

    def __call__(self, run: RunFolder, recipe: Recipe, members: Sequence[Member], options: LaunchOptions | None = None) -> None:
        self.calls.append([member.name for member in members])
        for member in members:
            if member.name not in self.failing:
                self.train(run, recipe, member.name)
        failed = self.failing & {member.name for member in members}
        if failed:
            raise TrainError(f"{', '.join(sorted(failed))}: not trained")

    def train(self, run: RunFolder, recipe: Recipe, name: str) -> None:
        """Train one model: refused unless its parent is there and fresh."""
        _, made_from = Stages(run, recipe, check_sources=False).open_for_training(name)
        assert run.open_expert(name, made_from) is None, "the folder was made ready for this training"
        value = float(sum(map(ord, name)) + sum(map(len, self.calls)) / 1000)
        run.close_expert(name, made_from, write_export(run.expert(name) / "export", value))
