"""The recipe of a child run: what one grown model is made from.

The child takes the run's settings of corpus, model and training, its tokenizer, and the export of the donor as a loaded seed. Its one
cluster is named like the expert. The text of the donor's languages is drawn again (replay), so that the new expert keeps what it builds
on; shares go by `train.language_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaxelm.errors import GrowError
from megaxelm.recipe import EvaluationConfig, Recipe, override_tree, parse_recipe

LEAST_SHARE = 0.01
"""Languages with less than this share of a donor's tokens are not replayed: clusters of documents hold a little of nearly all."""
_OTHER_ORDER = 1000
_OURS = ("name", "seed", "tokenizer", "clusters", "experts", "corpus.languages", "train.language_weights", "train.language_alpha", "rounds")
_INSTEAD = {"train.steps": "--steps", "corpus.train": "--corpus", "corpus.valid": "--valid"}


@dataclass(frozen=True)
class ChildPlan:
    """What is particular to one child. `weights`: shares of the languages that it trains on, the new ones first."""

    name: str
    languages: tuple[str, ...]
    donor: str
    donor_export: Path
    weights: Mapping[str, float]
    steps: int
    batch_sequences: int
    sources: Sequence[Any]
    """All sources of training text, as a recipe has them."""
    valid: Sequence[Any] = ()
    """All sources of held-out text."""
    overrides: Sequence[str] = ()
    generation: int = 1
    """How many times the line of its donors was grown, this time counted."""


@dataclass(frozen=True)
class TextSources:
    """`--corpus` and `--valid`: sources as a recipe has them."""

    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)


def parse_sources(given: Sequence[str], languages: Sequence[str]) -> list[dict[str, Any]]:
    """Sources from the command line: a path or glob, or `<language>=<path>` where the text does not say its language."""
    found: list[dict[str, Any]] = []
    for item in given:
        code, separator, path = item.partition("=")
        known = separator and code in languages
        found.append({"files": [path if known else item], "language": code if known else None})
    return found


def mixing_weights(target_tokens: Mapping[str, float], donor_tokens: Mapping[str, int], replay: float) -> dict[str, float]:
    """Shares of the languages in training: `1 - replay` to the new ones and `replay` to the donor's, each in proportion to its tokens.

    Donor languages of less than 1 % of the donor's tokens are left out; of the new ones, those that are the donor's too.
    """
    others = {code: tokens for code, tokens in donor_tokens.items() if code not in target_tokens and tokens > 0}
    least = LEAST_SHARE * sum(others.values())
    kept = {code: tokens for code, tokens in others.items() if tokens >= least}
    if not replay or not kept:
        kept, replay = {}, 0.0
    new, old = sum(target_tokens.values()), sum(kept.values())
    weights = {code: (1 - replay) * tokens / new for code, tokens in target_tokens.items()}
    return weights | {code: replay * tokens / old for code, tokens in sorted(kept.items())}


def child_recipe(parent: Recipe, tokenizer_folder: Path, plan: ChildPlan) -> Recipe:
    """The recipe of a child run.

    Args:
        parent: recipe that the donor was trained with; settings that are not the child's own are taken from it.

    Raises:
        GrowError: an override of a field that growing sets itself. RecipeError: settings that do not fit together.
    """
    for override in plan.overrides:
        key = override.partition("=")[0].strip()
        taken = next((name for name in _OURS if key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.")), None)
        if taken or key in _INSTEAD:
            instead = f"use {_INSTEAD[key]}" if key in _INSTEAD else "leave it out"
            raise GrowError(f"--set {override}: `{key}` of a grown expert is set by `megaxelm grow`; {instead}")
    tree = parent.model_dump(mode="json")
    clusters = {"partitioner": "mapping", "mapping": {plan.name: list(plan.weights)}, "tfidf": tree["clusters"]["tfidf"]}
    evaluation = {"max_documents": parent.evaluation.max_documents, "sequence_length": parent.evaluation.sequence_length}
    tree["corpus"] |= {
        "train": list(plan.sources),
        "valid": list(plan.valid),
        "languages": list(plan.weights),
    }
    tree["train"] |= {
        "steps": plan.steps,
        "batch_sequences": plan.batch_sequences,
        "language_alpha": 1.0,
        "language_weights": dict(plan.weights),
        # The donor has read its languages in the order of its own seed: replay comes in another.
        "seed": (parent.train.seed + _OTHER_ORDER * plan.generation) % 2**32,
    }
    tree["tokenizer"] |= {"load": str(tokenizer_folder)}
    tree["experts"] |= {"dense": False, "batch_sequences": None, "steps": None, "allow_unequal_tokens": False}
    tree |= {
        "name": plan.name,
        "clusters": clusters | {"seed": parent.clusters.seed},
        "seed": {"load": str(plan.donor_export)},
        # The child is one expert: it has no mixture of its own.
        "ensemble": {},
        "evaluation": EvaluationConfig(**evaluation).model_dump(mode="json"),
    }
    if "rounds" in tree:
        tree["rounds"] = []
    return parse_recipe(override_tree(tree, plan.overrides), f"grow {plan.name}")
