"""Experts spread over the ranks of torch.distributed: each rank runs its own, the mixture is reduced, every rank chooses the same token.

All ranks hold the same texts and router and take the same steps. What crosses between them is a mixture [texts, vocab] a token, and for a
router that learns from the experts their log-probability of it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from megaxelm.errors import RoutingError


class Shards:
    """Which experts this rank runs: number `rank`, `rank + ranks`, ...

    Args:
        num_experts: in the ensemble.
        rank, ranks: None takes those of the default process group.

    Raises:
        RoutingError: more ranks than experts.
    """

    def __init__(self, num_experts: int, rank: int | None = None, ranks: int | None = None) -> None:
        rank = dist.get_rank() if rank is None else rank
        ranks = dist.get_world_size() if ranks is None else ranks
        if ranks > num_experts:
            raise RoutingError(
                f"ensemble.devices = {ranks}: choose 1 to {num_experts}, the number of experts; a device without one would idle"
            )
        self.rank, self.ranks = rank, ranks
        self.experts = list(range(rank, num_experts, ranks))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        dist.all_reduce(x)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """Maximum over the ranks."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """Log of the sum over the ranks of exp(x)."""
        top = self.maximum(x.clone())
        base = torch.where(top > -torch.inf, top, 0.0)
        return self.sum((x - base).exp_()).log_() + base


def rank_device(device: torch.device) -> torch.device:
    """The device of this process: on a rank of several with CUDA one of its own."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def join_ranks(num_experts: int, device: torch.device) -> Shards | None:
    """The experts of this process where a launcher started several of it; None in a process by itself.

    Raises:
        RoutingError: more ranks than experts.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Shards(num_experts)


def run_on_devices(devices: int, arguments: list[str]) -> int:
    """Run `megaxelm` with these arguments as so many ranks on this machine; the exit code of the first that fails, or 0.

    When one fails, the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(os.environ) | {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "megaxelm.cli", *arguments]
    ranks = [subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(devices)]
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return failed[0] if failed else 0
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()
