"""The ranks of one training meet."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed

_SHARED_MEMORY = Path("/dev/shm")


def join_process_group(cuda: bool) -> None:
    """Initialise torch.distributed by DeepSpeed (NCCL or gloo) and wait for all ranks.

    On a CPU DeepSpeed gives each rank 66 MB of shared memory for its collectives, and never takes the name of it away. All ranks of the
    node have it open when they have met, so the name is removed then: the memory is free when the ranks end, however they end.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    torch.distributed.barrier()
    place = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{torch.distributed.get_rank()}"
    (_SHARED_MEMORY / f"deepspeed_allreduce_buffer_{place}").unlink(missing_ok=True)
