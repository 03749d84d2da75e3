"""Distillation of a mixture into one dense model: each step's loss is measured against what the mixture predicts.

The teacher's experts read a batch once and leave hidden states [tokens, H]; their logits exist for some rows at a time, expert after
expert, and are summed to the mixture's log-probabilities there. So neither the full logits of a batch nor those of all experts exist at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megaxelm.corpus.packing import IGNORED, PackedBatch
from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.scoring import weights_along
from megaxelm.model.decoder import Decoder
from megaxelm.train.steps import Steps


class MixtureTeacher:
    """The mixture of some experts under a router.

    Args:
        top_m: experts kept at each token; None: all.
        options: `attention` and `kernels` of the experts' forward pass.
    """

    def __init__(self, decoders: Sequence[Decoder], router: Router, top_m: int | None, options: dict[str, Any] | None = None) -> None:
        self.decoders, self.router, self.top_m = list(decoders), router, top_m
        self.options = {key: value for key, value in (options or {}).items() if key in ("attention", "kernels")}

    @torch.no_grad()
    def of(self, batch: PackedBatch) -> Callable[[slice], Tensor]:
        """Log-probabilities [rows, vocab_size] fp32 of the mixture for rows of a batch.

        The router reads each segment from its start, as it would a text; the language is that of the segment's window.
        """
        hidden: list[Tensor | None] = [None] * len(self.decoders)
        streams: Tensor | None = None
        if self.router.needs_expert_logprobs:
            states = [self._read(decoder, batch) for decoder in self.decoders]
            hidden = list(states)
            each = [decoder.score_hidden(state, batch.labels) for decoder, state in zip(self.decoders, states, strict=True)]
            streams = torch.stack([scores.target_logprob for scores in each]).cpu()
        log_w = self._weights(batch, streams).to(batch.tokens.device)
        for number, heard in enumerate((log_w > -torch.inf).any(0).tolist()):
            if not heard:
                hidden[number] = None
            elif hidden[number] is None:
                hidden[number] = self._read(self.decoders[number], batch)

        @torch.no_grad()
        def rows(part: slice) -> Tensor:
            mixed: Tensor | None = None
            for number, (decoder, state) in enumerate(zip(self.decoders, hidden, strict=True)):
                if state is None or not bool((log_w[part, number] > -torch.inf).any()):
                    continue
                own = decoder.logits(state[part]).float().log_softmax(-1) + log_w[part, number, None]
                mixed = own if mixed is None else torch.logaddexp(mixed, own)
            assert mixed is not None  # the weights of a row sum to 1
            return mixed

        return rows

    def _read(self, decoder: Decoder, batch: PackedBatch) -> Tensor:
        found = decoder(batch.tokens, batch.positions, batch.cu_seqlens, **self.options)
        assert isinstance(found, Tensor)
        return found

    def _weights(self, batch: PackedBatch, streams: Tensor | None) -> Tensor:
        """Log weights [N, experts] fp32 before the label of each row; a row without a label counts its text's first weights."""
        length = len(batch.tokens) // len(batch.languages)
        labels = batch.labels.tolist()
        bounds = batch.cu_seqlens.tolist()
        found = torch.empty(len(labels), self.router.num_experts, dtype=torch.float32)
        for start, end in zip(bounds, bounds[1:], strict=False):
            request = Request((), batch.languages[start // length])
            last = end - 1 if labels[end - 1] == IGNORED else end
            ids = labels[start:last] or [0]
            stream = None if streams is None else streams[:, start : start + len(ids)]
            log_w = weights_along(self.router, request, ids, self.top_m, stream).float()
            found[start : start + len(ids)] = log_w
            found[start + len(ids) : end] = log_w[0]
        return found


class DistillSteps(Steps):
    """Optimiser steps whose loss is measured against a teacher; `label_weight` is the share of the labels beside it."""

    def __init__(self, *arguments: Any, teacher: MixtureTeacher, label_weight: float) -> None:
        super().__init__(*arguments)
        self.teacher, self.label_weight = teacher, label_weight

    def loss_options(self, batch: PackedBatch) -> dict[str, Any]:
        return {"teacher": self.teacher.of(batch), "label_weight": self.label_weight}
