"""From the experts' hidden states to the next token of each text.

`fused` is one operation from hidden states to tokens. `LogitRows` keeps the logits of the kept experts and mixes them afterwards: where
experts take turns in memory or lie on several ranks, where likely alternatives are reported, and where a draft is verified, which reads
several tokens of a text at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaxelm.ensemble.running import RunningText
from megaxelm.ensemble.shards import Shards
from megaxelm.ensemble.weights import Weights
from megaxelm_kernels.grouped_linear import grouped_linear
from megaxelm_kernels.mixture import MixtureToken, Sampling, choose_tokens, mean_logits, mix_logits, mixture_next_token, row_lse
from megaxelm_kernels.row_groups import RowGroups

if TYPE_CHECKING:
    from megaxelm.model.stacked import Read, StackedDecoder


@dataclass(frozen=True)
class MixtureSettings:
    """How the experts' distributions become one."""

    combine: str = "mixture"
    temperature_on: str = "mixture"


@dataclass(frozen=True)
class NextTokens:
    """One token for each of some texts."""

    tokens: list[int]
    logprobs: list[float]
    """Under the mixture (nats), before temperature and filters."""
    own: Tensor
    """[texts, experts run] log-probability under each expert that was run, -inf where it has no weight."""
    top: list[list[tuple[int, float]]]
    """(token, log-probability) of the likeliest, as many as each text asks for."""


def sampling_of(texts: Sequence[RunningText], device: torch.device, ahead: int = 0) -> Sampling:
    """The sampling parameters of some texts as tensors; `ahead`: for the token that comes so many after the next."""
    params = [text.sampling for text in texts]

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Sampling(
        temperature=column([item.temperature for item in params], torch.float32),
        top_k=column([item.top_k for item in params], torch.int64),
        top_p=column([item.top_p for item in params], torch.float32),
        min_p=column([item.min_p for item in params], torch.float32),
        key=column([text.key for text in texts], torch.int64),
        position=column([text.num_written + ahead for text in texts], torch.int64),
        greedy=all(item.temperature == 0 for item in params),
        filtered=any(item.top_k or item.top_p < 1 or item.min_p for item in params),
    )


def fused(stack: StackedDecoder, read: Read, rows: Tensor, log_w: Tensor, sampling: Sampling, settings: MixtureSettings) -> MixtureToken:
    """The next token of each text: `rows` [texts, m] rows of `read.hidden`, `log_w` [texts, m]."""
    return mixture_next_token(
        read.hidden,
        stack.heads,
        read.groups,
        rows,
        log_w.to(read.hidden.device, torch.float32),
        sampling,
        vocab_size=stack.config.vocab_size,
        combine=settings.combine,
        temperature_on=settings.temperature_on,
        kernels=stack.kernels,
    )


class LogitRows:
    """Logits [vocab] fp32 of (text, place, expert), as they come from one call of the stack or several.

    Args:
        reduce: over the ranks that share the experts; None: all experts are here.
    """

    def __init__(self, stack: StackedDecoder, settings: MixtureSettings, reduce: Shards | None = None) -> None:
        self._stack, self._settings, self._reduce = stack, settings, reduce
        self._logits: list[Tensor] = []
        self._place: dict[tuple[int, int, int], int] = {}
        self._num_rows = 0

    def add(self, read: Read, rows: Sequence[tuple[tuple[int, int, int], int]]) -> None:
        """Rows of a call: ((text, place, expert), row of `read.hidden`)."""
        stack = self._stack
        rows = sorted(rows, key=lambda item: item[1])
        wanted = [row for _, row in rows]
        hidden, groups = read.hidden, read.groups
        if len(wanted) < hidden.shape[0]:
            hidden = hidden[torch.tensor(wanted, device=hidden.device)]
            groups = RowGroups([bisect_left(wanted, offset) for offset in groups.offsets], groups.device)
        found = grouped_linear(hidden, stack.heads, None, groups, kernels=stack.kernels)
        self._logits.append(found[:, : stack.config.vocab_size].float())
        for number, (name, _) in enumerate(rows):
            self._place[name] = self._num_rows + number
        self._num_rows += len(rows)

    def next_tokens(self, texts: Sequence[int], place: int, kept: Weights, run: Weights, running: Sequence[RunningText]) -> NextTokens:
        """The token at `place` (0: the next) of the texts number `texts`, mixed by `kept` [texts, m], and what those of `run` say of it."""
        # Texts move on place by place, so a text's own count says which token is drawn.
        sampling = sampling_of(running, self._stack.device)
        mixed, drawn_from = self.mix(texts, place, kept, sampling.temperature)
        tokens, logprobs = self._choose(mixed, drawn_from, sampling)
        own = self._token_logprobs(texts, place, run, tokens)
        return NextTokens(tokens, logprobs, own, _likeliest(mixed, [text.sampling.logprobs for text in running]))

    def mix(self, texts: Sequence[int], place: int, kept: Weights, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Mixture of the experts at a place of some texts, and what is drawn from.

        Args:
            texts: their numbers; kept: their weights [texts, m]; temperature: [texts], used where each expert has it.

        Returns:
            Log-probabilities of the mixture [texts, vocab] fp32, and of the one that is drawn from: another only where temperature is the
            experts'.
        """
        mixed = self._mixed(texts, place, kept, None)
        if self._settings.temperature_on == "mixture" or not bool((temperature > 0).any()):
            return mixed, mixed
        return mixed, self._mixed(texts, place, kept, temperature)

    def _mixed(self, texts: Sequence[int], place: int, kept: Weights, temperature: Tensor | None) -> Tensor:
        product = self._settings.combine == "logit_mean"
        rows, log_w = self._table(texts, place, kept)
        warm = None if temperature is None else torch.where(temperature > 0, temperature, 1.0)
        if not self._place:
            # No expert of this rank has a say.
            total = torch.full((len(texts), self._stack.config.vocab_size), 0.0 if product else -torch.inf, device=self._stack.device)
        elif product:
            total = mean_logits(self._rows, rows, log_w)
            total = total if warm is None else total / warm[:, None]
        else:
            total = mix_logits(self._rows, rows, log_w, warm)
        if self._reduce is not None:
            total = self._reduce.sum(total) if product else self._reduce.logsumexp(total)
        return total.log_softmax(-1) if product else total

    def _table(self, texts: Sequence[int], place: int, kept: Weights) -> tuple[Tensor, Tensor]:
        """Row of the logits of each kept expert [texts, m], and the log weights, -inf for what has not run here."""
        experts, device = kept.experts.tolist(), self._stack.device
        rows = [[self._place.get((text, place, expert)) for expert in line] for text, line in zip(texts, experts, strict=True)]
        here = torch.tensor([[row is not None for row in line] for line in rows], device=device)
        table = torch.tensor([[row or 0 for row in line] for line in rows], device=device)
        return table, torch.where(here, kept.log_w.to(device, torch.float32), -torch.inf)

    @property
    def _rows(self) -> Tensor:
        if len(self._logits) > 1:
            self._logits = [torch.cat(self._logits)]
        return self._logits[0]

    def _token_logprobs(self, texts: Sequence[int], place: int, kept: Weights, tokens: Sequence[int]) -> Tensor:
        """Each kept expert's log-probability [texts, m] fp32 of a token; -inf where it has not run."""
        rows, log_w = self._table(texts, place, kept)
        if self._place:
            token = torch.tensor(tokens, device=rows.device)[:, None]
            found = torch.where(log_w > -torch.inf, self._rows[rows, token] - row_lse(self._rows)[rows], -torch.inf)
        else:
            found = torch.full(rows.shape, -torch.inf, device=self._stack.device)
        return self._reduce.maximum(found) if self._reduce is not None else found

    def _choose(self, mixed: Tensor, drawn_from: Tensor, sampling: Sampling) -> tuple[list[int], list[float]]:
        """Tokens [texts] and their log-probabilities under the mixture."""
        if self._settings.temperature_on == "experts":
            flat = torch.where(sampling.temperature > 0, 1.0, 0.0)
            sampling = Sampling(
                flat, *(getattr(sampling, name) for name in ("top_k", "top_p", "min_p", "key", "position", "greedy", "filtered"))
            )
        tokens = choose_tokens(drawn_from, sampling)
        return tokens.tolist(), mixed.gather(1, tokens[:, None])[:, 0].tolist()


def _likeliest(mixed: Tensor, wanted: Sequence[int]) -> list[list[tuple[int, float]]]:
    if not any(wanted):
        return [[] for _ in wanted]
    values, ids = mixed.topk(min(max(wanted), mixed.shape[1]), dim=-1)
    return [
        list(zip(row_ids[:number], row[:number], strict=True))
        for number, row, row_ids in zip(wanted, values.tolist(), ids.tolist(), strict=True)
    ]
