"""The rounds of a run: which experts each trains, over which clusters, with how many steps and sequences (paper, Hierarchical Multi-Round).

A run without `rounds` in its recipe has one round: an expert a cluster, all branched from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaxelm.errors import RecipeError, StageError
from megaxelm.recipe import Recipe, round_steps

_RATE = ("lr", "schedule", "warmup_steps", "final_lr_ratio")

Level = Mapping[str, Sequence[str]]
"""Experts of one round: a name to the clusters under it."""


@dataclass(frozen=True)
class Round:
    """Experts that train at the same time. `rate`: what the round has in place of the learning rate and schedule of `train`."""

    experts: dict[str, tuple[str, ...]]
    """Names to the clusters that each trains on."""
    steps: int
    batch_sequences: int
    rate: dict[str, Any] = field(default_factory=dict)


def plan_rounds(recipe: Recipe, cluster_names: Sequence[str], levels: Sequence[Level] = ()) -> list[Round]:
    """The rounds in order; the last one's experts are those of the clusters.

    Args:
        levels: divisions of the rounds before the last, from the clusters' report; not looked at where the recipe has no rounds.

    Raises:
        RecipeError: a batch that cannot be shared, rounds that do not add up, or that end with another number of experts.
        StageError: the clusters were made without the tree that the rounds go down.
    """
    k, train = len(cluster_names), recipe.train
    leaves: dict[str, tuple[str, ...]] = {name: (name,) for name in cluster_names}
    steps = recipe.experts.steps or train.steps
    if not recipe.rounds:
        return [Round(leaves, steps, recipe.experts.batch_sequences or _share(train.batch_sequences, k))]
    counts = [item.k for item in recipe.rounds]
    if counts[-1] != k:
        raise RecipeError(
            f"rounds: the last has k = {counts[-1]}, and there are {k} clusters: the last round's experts are those of the clusters, "
            "so make them agree"
        )
    inner = [{name: tuple(clusters) for name, clusters in level.items()} for level in levels if len(counts) > 1]
    if [len(level) for level in inner] != counts[:-1] or not _are_nested([*inner, leaves]):
        raise StageError(
            f"rounds: the clusters of this run were not made for rounds of k = {', '.join(map(str, counts))}; make them again: "
            "megaxelm run RECIPE --until index"
        )
    lengths = round_steps(recipe.rounds, steps, recipe.experts.allow_unequal_tokens)
    return [
        Round(experts, length, _share(train.batch_sequences, item.k), {key: getattr(item, key) for key in _RATE})
        for experts, item, length in zip([*inner, leaves], recipe.rounds, lengths, strict=True)
    ]


def expected_levels(recipe: Recipe, cluster_names: Sequence[str]) -> list[dict[str, list[str]]]:
    """Stand-ins for the divisions of the rounds before the last, for a plan made before the clusters are: right in number alone."""
    finer = [[name] for name in cluster_names]
    levels: list[dict[str, list[str]]] = []
    for number, item in reversed(list(enumerate(recipe.rounds[:-1], 1))):
        groups: list[list[str]] = [[] for _ in range(item.k)]
        for place, group in enumerate(finer):
            groups[place * item.k // len(finer)] += group
        levels.insert(0, {f"round{number}-{place}": group for place, group in enumerate(groups)})
        finer = groups
    return levels


def _share(batch_sequences: int, k: int) -> int:
    if batch_sequences % k:
        raise RecipeError(
            f"train.batch_sequences = {batch_sequences} is not a multiple of the {k} clusters, so the experts cannot share "
            f"the batch equally: choose {max(k, round(batch_sequences / k) * k)}, for example"
        )
    return batch_sequences // k


def _are_nested(levels: Sequence[Mapping[str, tuple[str, ...]]]) -> bool:
    """Whether each level divides all clusters, and every expert of one lies within one expert of the level before."""
    clusters = sorted(levels[-1])
    if any(sorted(name for held in level.values() for name in held) != clusters for level in levels):
        return False
    return all(
        sum(not set(held).isdisjoint(parent) for parent in before.values()) == 1
        for before, after in zip(levels, levels[1:], strict=False)
        for held in after.values()
    )
