"""What DeepSpeed's AutoTP does with the decoder. The trainer refuses it for its checkpoints, not for its losses."""

import json
from pathlib import Path

import pytest
from tiny_run import run_module

from megaxelm.train.environment import free_port


@pytest.mark.slow
def test_a_decoder_in_parts_has_the_losses_of_a_whole_one() -> None:
    script = Path(__file__).with_name("autotp_rank.py")
    done = run_module("torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["query"] == [32, 64], "each rank has the queries of two of the four heads"
    assert found["parted"] == pytest.approx(found["whole"], rel=1e-5) and len(set(found["whole"])) == 4
