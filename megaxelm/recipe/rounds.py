"""Section of the recipe about rounds: experts that branch from experts, down a tree of clusters (paper, Hierarchical Multi-Round training).

What a list of rounds comes to, in steps, is reckoned here too, since a recipe with rounds that do not add up is no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from pydantic import Field, model_validator

from megaxelm.recipe.section import Schedule, Section


class RoundConfig(Section):
    """One round: k experts, each branched from the expert of the round before that holds its languages (the first: from the seed)."""

    k: int = Field(ge=1)
    """Experts of this round, more than in the round before. That of the last round is `clusters.k`."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps of each of its experts; null: by `share`, else an equal part of the steps that no other round takes."""
    share: float | None = Field(None, gt=0, le=1)
    """In place of `steps`: share of all steps (`train.steps`)."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; null: `train.lr`. Each round runs its own schedule from its first step to its last."""
    schedule: Schedule | None = None
    """Decay of the learning rate; null: `train.schedule`."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; null: `train.warmup_steps`."""
    final_lr_ratio: float | None = Field(None, ge=0, le=1)
    """Learning rate at the end as a share of the peak; null: `train.final_lr_ratio`."""

    @model_validator(mode="after")
    def _one_length(self) -> RoundConfig:
        if self.steps is not None and self.share is not None:
            raise ValueError(f"rounds: k = {self.k} has steps = {self.steps} and share = {self.share:g}: give one of them")
        return self


def check_rounds(rounds: Sequence[RoundConfig], k: int | None, batch_sequences: int, partitioner: str) -> None:
    """Look whether rounds lead down a tree to the clusters, and whether the experts of each can share the batch.

    Args:
        k: clusters of the last round, where the recipe says how many.

    Raises:
        ValueError: naming the field, the value, the rule and the way out.
    """
    counts = [item.k for item in rounds]
    for before, after in zip(counts, counts[1:], strict=False):
        if after <= before:
            raise ValueError(f"rounds: k = {after} after k = {before}: each round divides the experts of the one before, so k must grow")
    if k is not None and counts[-1] != k:
        raise ValueError(
            f"rounds: the last has k = {counts[-1]}, and there are {k} clusters (clusters.k): the last round's experts are those of the "
            "clusters, so make them agree"
        )
    if len(rounds) > 1 and partitioner == "random":
        raise ValueError(
            "rounds: clusters.partitioner = random has no tree to go down: choose typology, tfidf, language or mapping, or leave out rounds"
        )
    for count in counts:
        if batch_sequences % count:
            raise ValueError(
                f"rounds: train.batch_sequences = {batch_sequences} is not a multiple of k = {count}, so the experts of that round cannot "
                f"share the batch equally: choose a multiple of {math.lcm(*counts)}"
            )


def round_steps(rounds: Sequence[RoundConfig], total: int, allow_unequal: bool = False) -> list[int]:
    """Optimiser steps of each round; together `total`, those of the flat run, so that both see the same number of tokens.

    Rounds that name neither `steps` nor `share` divide equally what the others leave. Fractions are rounded so that the sums of the first
    rounds are as near as can be to what was asked for.

    Args:
        allow_unequal: let the sum be another one.

    Raises:
        ValueError: the rounds do not add up to `total`, or one of them would have no step.
    """
    wanted = [_steps(item, total) for item in rounds]
    given = sum((steps for steps in wanted if steps is not None), Fraction(0))
    open_rounds = wanted.count(None)
    left = (total - given) / max(1, open_rounds)
    if open_rounds and left < 1:
        raise ValueError(
            f"rounds: {float(given):g} of {total} steps (experts.steps, else train.steps) are taken by rounds that name theirs, and the "
            f"other {open_rounds} would have none: lower `steps` or `share`"
        )
    made: list[int] = []
    until = Fraction(0)
    for steps in wanted:
        until += left if steps is None else steps
        made.append(math.floor(until + Fraction(1, 2)) - sum(made))
    for item, length in zip(rounds, made, strict=True):
        if length < 1:
            raise ValueError(f"rounds: share = {item.share} of {total} steps is not one step of the round with k = {item.k}: raise it")
    if sum(made) != total and not allow_unequal:
        raise ValueError(
            f"rounds: their steps come to {sum(made)} ({' + '.join(map(str, made))}), while flat training has {total} (experts.steps, else "
            "train.steps), so the comparison would not be equal: change them, leave out `steps` and `share` of one round, or set "
            "experts.allow_unequal_tokens = true"
        )
    return made


def _steps(item: RoundConfig, total: int) -> Fraction | None:
    if item.share is not None:
        # 0.3 is meant as three tenths, and three times .333 as about all.
        return Fraction(item.share).limit_denominator(10_000) * total
    return None if item.steps is None else Fraction(item.steps)
