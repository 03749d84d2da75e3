"""A model of more than 500M parameters starts and is exported without ever being whole in one process."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from megaxelm.model.hub import weights_hash


@pytest.mark.slow
def test_a_large_model_starts_under_zero3_and_is_exported_in_parts(tmp_path: Path) -> None:
    peaks = json.loads(run_ranks("train/large_ranks.py", 2, "start", str(tmp_path)).splitlines()[-1])
    peaks |= json.loads(run_ranks("train/large_ranks.py", 1, "export", str(tmp_path)).splitlines()[-1])
    assert peaks["parameters"] >= 500e6
    model = 4 * peaks["parameters"]
    assert peaks["build"] <= 0.4 * model, "a rank holds half of the model in bf16, which is a quarter of it in fp32"
    states = (4 + 2) * peaks["parameters"] / 2
    assert peaks["start"] - states <= 0.4 * model, "beyond this rank's fp32 and bf16 weights, which training needs"
    assert peaks["fill"] <= peaks["start"] + 0.05 * model, "filling adds one tensor at a time"
    assert peaks["export"] <= 0.4 * model
    # The weights went from the seed through both ranks' partitions and into the export, bit for bit.
    assert weights_hash(tmp_path / "exported") == weights_hash(tmp_path / "seed")
