"""Sequence parallelism for long contexts: the ranks of a group share the tokens of each packed batch.

Everything but attention works on a rank's own slice of the tokens. For attention DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509)
exchanges: all tokens of some of the heads in place of some tokens of all heads, and back. Memory of activations falls with the group's
size, and no rank needs more than its share of the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from megaxelm.corpus.packing import PackedBatch
from megaxelm.errors import TrainError
from megaxelm.model.config import DecoderConfig
from megaxelm.train.environment import Processes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_sequence_parallel(size: int, world_size: int, config: DecoderConfig, sequence_length: int) -> None:
    """Look whether `size` ranks can share a sequence of this model.

    Raises:
        TrainError: the number of ranks, heads or tokens cannot be divided by it, or there is attention dropout.
    """
    if size == 1:
        return
    for name, value in (
        ("ranks", world_size),
        ("model.num_heads", config.num_heads),
        ("model.num_kv_heads", config.num_kv_heads),
        ("train.sequence_length", sequence_length),
    ):
        if value % size:
            raise TrainError(f"train.sequence_parallel = {size}: {name} = {value} is not a multiple of it; choose a size that divides it")
    if config.attention_dropout:
        raise TrainError(
            f"train.sequence_parallel = {size} with model.attention_dropout = {config.attention_dropout}: each rank would draw for other "
            "heads than a rank alone; set it to 0"
        )


def own_slice(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """The tokens [N / size] of one rank of a group. `cu_seqlens` stays that of the whole batch, which attention sees."""
    tokens = batch.tokens.shape[0] // size
    mine = slice(rank * tokens, (rank + 1) * tokens)
    names = ("tokens", "labels", "positions", "sample_ids")
    parts: dict[str, Any] = {name: getattr(batch, name)[mine] for name in names}
    return replace(batch, **parts, num_targets=int((parts["labels"] >= 0).sum()))


def sequence_group(processes: Processes, size: int) -> Any:
    """The group of `size` ranks in a row that share this rank's batches. Collective.

    DeepSpeed is not told of it: to ZeRO all ranks are alike, and each has a part of the loss and its gradient. (Its own setting
    `sequence_parallel_size` would sum gradients only over ranks of different groups: `groups._get_sequence_data_parallel_group` is the data
    parallel group in 0.19.)
    """
    import torch.distributed as dist

    mine = None
    for first in range(0, processes.world_size, size):
        group = dist.new_group(range(first, first + size))
        mine = group if first <= processes.rank < first + size else mine
    return mine


class Exchange:
    """Attention over all tokens of a group, each of whose ranks has a slice: q [N / P, heads, d], k, v [N / P, kv_heads, d].

    Args:
        group: the P ranks that share a batch.
    """

    def __init__(self, group: Any) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._attention = DistributedAttention(_Batched(), group, scatter_idx=2, gather_idx=1)

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._attention.local_attn.attend = attend
        return self._attention(q[None], k[None], v[None], 0)[0]


class _Batched(nn.Module):
    """Attention of packed tokens behind the batch dimension that DeepSpeed's exchange has."""

    attend: Attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q[0], k[0], v[0])[None]
