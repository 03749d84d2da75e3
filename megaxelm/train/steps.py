"""One optimiser step of one rank: which samples, forward and backward of each micro-batch, the update.

The loss of a step is the mean over its predicted tokens of all ranks and micro-batches: every rank knows the step's total before the
first forward pass, and DeepSpeed's averaging over ranks and micro-batches is undone by the scale of the loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megaxelm.corpus.packing import IGNORED, PackedBatch, pack
from megaxelm.corpus.sampling import Blend
from megaxelm.errors import TrainError
from megaxelm.files import hash_value
from megaxelm.train.members import lora_settings
from megaxelm.train.metrics import Meter
from megaxelm.train.schedule import learning_rate
from megaxelm.train.setting import Setting, sum_over_ranks
from megaxelm.train.ulysses import own_slice
from megaxelm_kernels.dropout import DropoutKey, dropout_keys


@dataclass(frozen=True)
class StepResult:
    """What one step came to.

    `tokens`: over all ranks; `grad_norm`: before clipping, None where it was not finite; `applied`: false when the gradient
    was not finite and the step was skipped; `by_language`: nats and predicted tokens of this rank, [languages, 2] fp64, on its
    device.
    """

    tokens: int
    lr: float
    grad_norm: float | None
    by_language: torch.Tensor
    applied: bool

    @property
    def loss(self) -> float:
        """Nats a predicted token, of this rank."""
        nats, targets = self.by_language.sum(dim=0).tolist()
        return nats / targets if targets else math.nan


class Steps:
    """Optimiser steps of one rank: which samples, forward and backward of each micro-batch, the update.

    Args:
        options: of the model's forward pass: the attention backend and the rows of a chunk of the loss.
        meter: told of every batch.
        watch: called after every micro-batch; what it raises ends the step before its update.
    """

    def __init__(
        self,
        setting: Setting,
        engine: Any,
        blend: Blend,
        options: dict[str, Any],
        meter: Meter | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.setting = setting
        self.engine = engine
        self.blend = blend
        self.options = options
        self.meter = meter
        self.watch = watch
        self.languages = sorted(blend.streams)

    def samples(self, step: int) -> range:
        """The numbers of the samples of a step, over all ranks."""
        size = self.setting.member.batch_sequences
        return range(step * size, (step + 1) * size)

    def run(self, step: int) -> StepResult:
        """Do step `step` (from 0) on this rank's share of its samples. Collective."""
        setting, engine = self.setting, self.engine
        member, config = setting.member, setting.recipe.train
        with self.meter.data() if self.meter else contextlib.nullcontext():
            batches = list(self._batches(step))
        targets = int(sum_over_ranks(sum(batch.num_targets for batch in batches), setting))
        if targets == 0:
            raise TrainError(f"`{member.name}`: step {step} has no token to predict; are all documents of its languages empty?")
        lr = learning_rate(member, step)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        by_language = torch.zeros(len(self.languages), 2, dtype=torch.float64, device=setting.device)
        for batch in batches:
            output = engine(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                labels=batch.labels,
                dropout=self._dropout(batch, step, member.sample_seed(config.seed)),
                **self.options,
                **self.loss_options(batch),
            )
            self._add_by_language(by_language, batch, output.token_losses)
            engine.backward(output.loss_sum * (setting.processes.world_size * len(batches) / targets))
            if batch is not batches[-1]:
                engine.step()
                self.watch()
        engine.step()
        norm = engine.get_global_grad_norm()
        tokens = member.batch_sequences * member.sequence_length
        applied = bool(engine.was_step_applied())
        return StepResult(tokens, lr, float(norm) if applied and norm is not None else None, by_language, applied)

    def loss_options(self, batch: PackedBatch) -> dict[str, Any]:
        """Further arguments of the model's forward pass on a batch, for a training with another loss."""
        return {}

    def _add_by_language(self, sums: torch.Tensor, batch: PackedBatch, token_losses: torch.Tensor) -> None:
        numbers = torch.tensor([self.languages.index(language) for language in batch.languages]).to(sums.device, non_blocking=True)
        # Of each token the number of its window in the batch, and so its language.
        rows = numbers[batch.sample_ids - batch.first_sample]
        counted = (batch.labels != IGNORED).double()
        sums.index_add_(0, rows, torch.stack([token_losses.double(), counted], dim=1))

    def _batches(self, step: int) -> Iterator[PackedBatch]:
        """This rank's share of the step's samples, in micro-batches. The samples of a step do not depend on the number of ranks."""
        member, config = self.setting.member, self.setting.recipe.train
        group, place = divmod(self.setting.processes.rank, config.sequence_parallel)
        share = member.batch_sequences // self.setting.data_ranks
        first = step * member.batch_sequences + group * share
        micro = self.setting.ds_config["train_micro_batch_size_per_gpu"]
        for start in range(first, first + share, micro):
            windows = self.blend.read(start, micro)
            batch = pack(windows, config.document_mask)
            if self.meter:
                self.meter.count(batch)
            yield own_slice(batch, place, config.sequence_parallel).to(self.setting.device)

    def _dropout(self, batch: PackedBatch, step: int, seed: int) -> DropoutKey | None:
        model = self.setting.recipe.model
        if model.attention_dropout:
            # The backends draw attention dropout from torch's generator: the same seed at the same place makes a resumed run repeat it.
            torch.manual_seed(int(hash_value([seed, step, int(batch.sample_ids[0])])[:15], 16))
        lora = lora_settings(self.setting.recipe, self.setting.member)
        if not model.dropout and not model.attention_dropout and not (lora and lora.dropout):
            return None
        tokens, place = batch.tokens.shape[0], self.setting.processes.rank % self.setting.recipe.train.sequence_parallel
        positions = torch.arange(place * tokens, (place + 1) * tokens, device=batch.tokens.device) % self.setting.member.sequence_length
        return dropout_keys(seed, step, batch.sample_ids, positions)
