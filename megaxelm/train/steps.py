"""One optimiser step of one rank: which samples, forward and backward of each micro-batch, the update.

The loss of a step is the mean over its predicted tokens of all ranks and micro-batches: every rank knows the step's total before the
first forward pass, and DeepSpeed's averaging over ranks and micro-batches is undone by the scale of the loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megaxelm.corpus.packing import PackedBatch, pack
from megaxelm.corpus.sampling import Blend
from megaxelm.errors import TrainError
from megaxelm.files import hash_value
from megaxelm.train.metrics import Meter
from megaxelm.train.schedule import learning_rate
from megaxelm.train.setting import Setting, sum_over_ranks
from megaxelm_kernels.dropout import DropoutKey, dropout_keys


@dataclass(frozen=True)
class StepResult:
    """`loss_sum` of this rank in nats; `targets` and `tokens` over all ranks."""

    loss_sum: float
    targets: int
    tokens: int
    lr: float
    grad_norm: float | None


class Steps:
    """Optimiser steps of one rank: which samples, forward and backward of each micro-batch, the update."""

    def __init__(self, setting: Setting, engine: Any, blend: Blend, options: dict[str, Any], meter: Meter | None = None) -> None:
        self.setting = setting
        self.engine = engine
        self.blend = blend
        self.options = options
        self.meter = meter

    def run(self, step: int) -> StepResult:
        setting, engine = self.setting, self.engine
        member, config = setting.member, setting.recipe.train
        world = setting.processes.world_size
        with self.meter.data() if self.meter else contextlib.nullcontext():
            batches = list(self._batches(step))
        if self.meter:
            for batch in batches:
                self.meter.count(batch)
        targets = int(sum_over_ranks(sum(batch.num_targets for batch in batches), setting))
        if targets == 0:
            raise TrainError(f"`{member.name}`: step {step} has no token to predict; are all documents of its languages empty?")
        lr = learning_rate(member, step)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=setting.device)
        for batch in batches:
            output = engine(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                labels=batch.labels,
                dropout=self._dropout(batch, step, member.sample_seed(config.seed)),
                **self.options,
            )
            loss = output.loss_sum * (world * len(batches) / targets)
            engine.backward(loss)
            engine.step()
            loss_sum += output.loss_sum.detach()
        norm = engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        total = float(loss_sum)
        if not math.isfinite(total) or (norm is not None and not math.isfinite(norm)):
            # Before this step is saved: a checkpoint of broken weights would take the place of a good one.
            raise TrainError(
                f"`{member.name}`: at step {step + 1} the loss is {total / targets:.4g} and the gradient norm {norm}; checkpoints before "
                "it stay. Lower train.lr, raise train.warmup_steps, or set train.precision = fp32; its training then begins anew"
            )
        tokens = member.batch_sequences * member.sequence_length
        return StepResult(total, targets, tokens, lr, norm)

    def _batches(self, step: int) -> Iterator[PackedBatch]:
        """This rank's share of the step's samples, in micro-batches. The samples of a step do not depend on the number of ranks."""
        member, processes = self.setting.member, self.setting.processes
        share = member.batch_sequences // processes.world_size
        first = step * member.batch_sequences + processes.rank * share
        micro = self.setting.ds_config["train_micro_batch_size_per_gpu"]
        for start in range(first, first + share, micro):
            windows = self.blend.read(start, micro)
            yield pack(windows, self.setting.recipe.train.document_mask).to(self.setting.device)

    def _dropout(self, batch: PackedBatch, step: int, seed: int) -> DropoutKey | None:
        model = self.setting.recipe.model
        if model.attention_dropout:
            # The backends draw attention dropout from torch's generator: the same seed at the same place makes a resumed run repeat it.
            torch.manual_seed(int(hash_value([seed, step, int(batch.sample_ids[0])])[:15], 16))
        if not model.dropout and not model.attention_dropout:
            return None
        length = self.setting.member.sequence_length
        positions = torch.arange(batch.tokens.shape[0], device=batch.tokens.device) % length
        return dropout_keys(seed, step, batch.sample_ids, positions)
