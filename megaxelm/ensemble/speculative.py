"""Speculative decoding: one expert proposes some tokens, the mixture reads them in one go and keeps those that it would have written.

What the mixture writes at a place follows from the text before it and from noise that is keyed by text, place and token (Gumbel-max). Both
sides draw with the same noise, so a proposal is right exactly where the mixture itself would have drawn it: the texts are those of decoding
without a draft, token for token, and so is their distribution. (Leviathan et al. 2023 reach the distribution by rejection; here the two
draws are coupled.) Greedy texts are the same for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megaxelm.ensemble.mixture_head import LogitRows, fused, sampling_of
from megaxelm.ensemble.routers import NO_TOKEN
from megaxelm.ensemble.running import RunningText
from megaxelm.ensemble.sampling import TokenEvent
from megaxelm.ensemble.weights import Weights
from megaxelm.model.stacked import Piece

if TYPE_CHECKING:
    from megaxelm.ensemble.engine import Engine


@dataclass
class DraftCount:
    """How the proposals have fared."""

    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    """Calls of the mixture, a text each."""
    written: int = 0

    def line(self) -> str:
        """In words, for the user."""
        share = self.accepted / max(self.proposed, 1)
        return (
            f"draft: {self.accepted} of {self.proposed} proposed tokens accepted ({share:.0%}); "
            f"{self.written / max(self.steps, 1):.2f} tokens a call of the mixture"
        )


def speculative_step(engine: Engine, texts: Sequence[RunningText]) -> list[TokenEvent]:
    """At least one more token of every text, at most `engine.draft_tokens` + 1."""
    drafts = _propose(engine, texts)
    first, run_first = engine.keep()
    engine.drop_unheard(texts, run_first)
    logits = _read_drafts(engine, texts, run_first, drafts)
    heard = [_heard(run_first, index) for index in range(len(texts))]
    events: list[TokenEvent] = []
    active = list(range(len(texts)))
    for place in range(max(map(len, drafts)) + 1):
        kept, run = (first, run_first) if place == 0 else engine.keep()
        # A weighting that wants an expert which has not read the draft ends it: the next step has it read.
        active = [index for index in active if _heard(run, index) <= heard[index]]
        if not active:
            break
        chosen = Weights(kept.log_w[active], kept.experts[active])
        here = [texts[index] for index in active]
        run = Weights(run.log_w[active], run.experts[active])
        found = logits.next_tokens(active, place, chosen, run, here)
        tokens = torch.full((len(texts),), NO_TOKEN)
        tokens[active] = torch.tensor(found.tokens)
        engine.tell_router(tokens, active, run, found.own)
        emitted = engine.take(here, chosen, found)
        events += emitted
        going_on = []
        for index, token, event in zip(active, found.tokens, emitted, strict=True):
            matched = place < len(drafts[index]) and drafts[index][place] == token
            engine.drafted.accepted += matched
            if matched and event.finish_reason is None:
                going_on.append(index)
        active = going_on
        if not active:
            break
    for text in texts:
        for row in (*text.rows.values(), *([text.draft_row] if text.draft_row else [])):
            row.length = min(row.length, len(text.history) - 1)
    engine.drafted.proposed += sum(map(len, drafts))
    engine.drafted.steps += len(texts)
    engine.drafted.written += len(events)
    return events


def _propose(engine: Engine, texts: Sequence[RunningText]) -> list[list[int]]:
    """What the drafting expert writes behind each text with the mixture's own noise."""
    stack, expert = engine.stack, engine.draft_place
    drafts: list[list[int]] = [[] for _ in texts]
    for text in texts:
        if text.draft_row is None:
            text.draft_row = engine.cache.new_row(text.bound)
    for ahead in range(engine.draft_tokens):
        # The last token that a text may still get comes from the mixture anyway.
        part = [index for index, text in enumerate(texts) if text.sampling.max_new_tokens - text.num_written - 1 > ahead]
        if not part:
            break
        pieces = []
        for index in part:
            text, row = texts[index], texts[index].draft_row
            assert row is not None
            pieces.append(Piece(expert, row, [*text.history, *drafts[index]][row.length :]))
        read = stack.read(pieces, engine.cache)
        rows = torch.tensor(read.first_row, device=stack.device)[:, None]
        sampling = sampling_of([texts[index] for index in part], stack.device, ahead)
        found = fused(stack, read, rows, torch.zeros(len(part), 1, device=stack.device), sampling, engine.settings)
        for index, token in zip(part, found.token.tolist(), strict=True):
            drafts[index].append(token)
    return drafts


def _heard(run: Weights, index: int) -> set[int]:
    return set(run.experts[index, run.log_w[index] > -torch.inf].tolist())


def _read_drafts(engine: Engine, texts: Sequence[RunningText], run: Weights, drafts: Sequence[Sequence[int]]) -> LogitRows:
    """Logits of every expert that is run after each text and after each token of its draft."""
    pieces, names = engine.pieces(texts, run, drafts)
    logits = LogitRows(engine.stack, engine.settings)
    for turn in engine.stack.batches([piece.expert for piece in pieces]):
        part = [index for index, piece in enumerate(pieces) if piece.expert in turn]
        read = engine.stack.read([pieces[index] for index in part], engine.cache, all_positions=True)
        rows = []
        for index, row in zip(part, read.first_row, strict=True):
            text, slot = names[index]
            last = row + len(pieces[index].tokens) - 1 - len(drafts[text])
            rows += [((text, place, int(run.experts[text, slot])), last + place) for place in range(len(drafts[text]) + 1)]
        logits.add(read, rows)
    return logits
