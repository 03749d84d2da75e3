"""Scripts that run as the ranks of one process group."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_run import REPOSITORY

from megaxelm.train.environment import free_port


def run_ranks(script: str, ranks: int, *arguments: str, timeout: int = 300) -> str:
    """Run a script of `tests/` on so many ranks; returns what rank 0 printed.

    The test fails with the output of all ranks when one of them ends with an error.
    """
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    path["PYTHONPATH"] = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "tests"))
    command = [sys.executable, str(REPOSITORY / "tests" / script), *arguments]
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
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-6000:] for output in outputs)
    return outputs[0]
