"""Experts side by side on the same rows, where one number a token of each does not suffice: the arg max of a mixture, or averaged logits.

The combined distribution exists for a chunk of rows at a time, [rows, vocab], and the experts are added to it one after the other: there
is never a tensor [rows, experts, vocab]. All experts that have weight are in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaxelm.ensemble.packed import Job, batches, document_jobs, pack, token_budget_of
from megaxelm.ensemble.windows import Windows
from megaxelm.errors import RoutingError
from megaxelm_kernels.mixture import COMBINE

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder

_BUFFERS = 3
"""Tensors [rows, vocab], in fp32 at least, that live together: the sum, one expert's logits, and their combination."""
_CPU_BYTES, _CUDA_BYTES = 1 << 27, 1 << 31


class CombinedRows(NamedTuple):
    """`logprob` [rows] of the label and `best` [rows] int64, the arg max, under the combined distribution; the lower id of equals."""

    logprob: Tensor
    best: Tensor


def rows_hidden(decoder: Decoder, documents_ids: Sequence[Sequence[int]], jobs: Sequence[Job], start_id: int) -> Tensor:
    """Hidden states [rows, hidden] before each scored token of these windows, read in one batch."""
    packed = pack(documents_ids, jobs, start_id).to(decoder.device)
    with torch.inference_mode():
        hidden = decoder(packed.tokens, packed.positions, packed.cu_seqlens, attention="auto")
        assert isinstance(hidden, Tensor)
        return hidden if packed.rows is None else hidden[packed.rows]


def combine_rows(
    decoders: Sequence[Callable[[], Decoder]],
    hidden: Sequence[Tensor | None],
    log_w: Tensor,
    labels: Tensor,
    combine: str = "mixture",
    rows_per_chunk: int | None = None,
) -> CombinedRows:
    """The combination of the experts at each row.

    Args:
        hidden: of each expert [rows, hidden], or None where it has no weight at any row. Rows without weight may hold anything.
        log_w: [rows, experts] normalised log weights, -inf drops an expert. labels: [rows] int64.
        rows_per_chunk: rows of the vocabulary that exist at one time; None: what a budget of memory holds.

    Raises:
        RoutingError: an unknown `combine`.
    """
    if combine not in COMBINE:
        raise RoutingError(f"combine = {combine!r}: choose one of {', '.join(COMBINE)}")
    logprobs, bests = [torch.empty(0, dtype=torch.float64)], [labels.new_empty(0)]
    step = rows_per_chunk or _rows_per_chunk(decoders, hidden)
    with torch.inference_mode():
        for begin in range(0, len(labels), step):
            part = slice(begin, begin + step)
            total = _added_up(decoders, [None if states is None else states[part] for states in hidden], log_w[part], combine)
            bests.append(total.argmax(-1).to(labels.device))
            target = total.gather(1, labels[part].to(total.device)[:, None])
            if combine != "mixture":
                # As the kernel of the loss has it: both may be large, so the greatest is taken off first.
                top = total.amax(-1, keepdim=True)
                target = (target - top) - total.sub_(top).exp_().sum(-1, keepdim=True).log()
            logprobs.append(target[:, 0].to("cpu", torch.float64))
    return CombinedRows(torch.cat(logprobs), torch.cat(bests))


def combined_logits(
    decoders: Sequence[Callable[[], Decoder]], hidden: Sequence[Tensor | None], log_w: Tensor, combine: str = "mixture"
) -> Tensor:
    """The whole combined distribution at each row, log-probabilities [rows, vocab] in fp32 at least; arguments as `combine_rows`."""
    vocab_size = decoders[0]().config.vocab_size
    total = _added_up(decoders, hidden, log_w, combine)[:, :vocab_size]
    return total if combine == "mixture" else total.log_softmax(-1)


def _rows_per_chunk(decoders: Sequence[Callable[[], Decoder]], hidden: Sequence[Tensor | None]) -> int:
    present = [expert for expert, states in enumerate(hidden) if states is not None]
    if not present:
        return 1
    weight = decoders[present[0]]().head.weight
    budget = _CUDA_BYTES if weight.device.type == "cuda" else _CPU_BYTES
    return max(1, budget // (_BUFFERS * max(4, weight.element_size()) * weight.shape[0]))


@torch.no_grad()
def _added_up(decoders: Sequence[Callable[[], Decoder]], hidden: Sequence[Tensor | None], log_w: Tensor, combine: str) -> Tensor:
    """Log-probabilities of the mixture [rows, padded vocab], or the averaged logits, which are not normalised; padding is -inf."""
    present = [expert for expert, states in enumerate(hidden) if states is not None] or [0]
    first = decoders[present[0]]()
    vocab_size, device, dtype = first.config.vocab_size, first.device, torch.promote_types(first.dtype, torch.float32)
    empty = -torch.inf if combine == "mixture" else 0.0
    total = torch.full((len(log_w), first.head.weight.shape[0]), empty, dtype=dtype, device=device)
    for expert in present:
        states = hidden[expert]
        here = (log_w[:, expert] > -torch.inf).nonzero().flatten()
        if not len(here) or states is None:
            continue
        weight = log_w[here, expert].to(device, dtype)[:, None]
        where = here.to(device)
        z = F.linear(states[where], decoders[expert]().head.weight).to(dtype)
        z[:, vocab_size:] = empty
        if combine == "mixture":
            z = z.log_softmax(-1).add_(weight)
            total[where] = torch.logaddexp(total[where], z)
        else:
            total.index_add_(0, where, z.mul_(weight.exp()))
    total[:, vocab_size:] = -torch.inf
    return total


def combined_documents(
    decoders: Sequence[Callable[[], Decoder]],
    documents_ids: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    start_id: int,
    combine: str,
    token_budget: int | None = None,
    windows: Windows | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Log-probability [tokens] fp64 of each document under `weights` [tokens, experts] that are known already."""
    found = [torch.empty(len(ids), dtype=torch.float64) for ids in documents_ids]
    used = [expert for expert in range(len(decoders)) if any(bool((log_w[:, expert] > -torch.inf).any()) for log_w in weights)]
    if not used:
        return found
    loaded = [decoders[expert]() for expert in used]
    positions = min(decoder.config.max_positions for decoder in loaded)
    jobs = document_jobs(documents_ids, windows, positions)
    readers = [int((log_w > -torch.inf).any(0).sum()) for log_w in weights]
    for batch in batches([job.window.length for job in jobs], token_budget_of(token_budget, loaded[0].device)):
        now = [jobs[index] for index in batch]
        log_w = torch.cat([weights[document][window.first : window.end] for document, window in now])[:, used]
        labels = torch.cat([torch.tensor(documents_ids[document][window.first : window.end]) for document, window in now])
        hidden = [_where_weighted(decoder, documents_ids, now, start_id, log_w[:, slot]) for slot, decoder in enumerate(loaded)]
        rows = combine_rows([lambda decoder=decoder: decoder for decoder in loaded], hidden, log_w, labels, combine)  # type: ignore[misc]
        counts = [window.end - window.first for _, window in now]
        for (document, window), part in zip(now, rows.logprob.split(counts), strict=True):
            found[document][window.first : window.end] = part
        if on_tokens:
            on_tokens(sum(count * readers[document] for count, (document, _) in zip(counts, now, strict=True)))
    return found


def _where_weighted(
    decoder: Decoder, documents_ids: Sequence[Sequence[int]], jobs: Sequence[Job], start_id: int, log_w: Tensor
) -> Tensor | None:
    """Hidden states [rows, hidden] of all windows, of which only those are read where the expert has weight at some row."""
    counts = [window.end - window.first for _, window in jobs]
    heard = [bool((part > -torch.inf).any()) for part in log_w.split(counts)]
    if not any(heard):
        return None
    states = rows_hidden(decoder, documents_ids, [job for job, is_heard in zip(jobs, heard, strict=True) if is_heard], start_id)
    if all(heard):
        return states
    whole = states.new_zeros(sum(counts), states.shape[1])
    where = torch.cat([torch.full((count,), is_heard) for count, is_heard in zip(counts, heard, strict=True)])
    whole[where.to(whole.device)] = states
    return whole
