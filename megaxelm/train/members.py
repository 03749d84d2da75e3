"""What is trained: seed, dense baseline and one expert a cluster, as a graph in which each knows its parent; and the account of tokens.

Equal compute (paper, section 4.1): the dense model gets the whole batch, each of k experts 1/k of the batch for the same steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megaxelm.errors import RecipeError, TrainError
from megaxelm.recipe import LoraConfig, Recipe, result_settings

_RATE = ("lr", "schedule", "warmup_steps", "final_lr_ratio", "decay_share", "language_alpha")


@dataclass(frozen=True)
class Member:
    """One model of the run and how it is trained. `clusters` is None for the whole corpus; a loaded seed has `steps` 0."""

    name: str
    kind: Literal["seed", "dense", "expert"]
    parent: str | None
    clusters: tuple[str, ...] | None
    steps: int
    batch_sequences: int
    sequence_length: int
    lr: float
    schedule: str
    warmup_steps: int
    final_lr_ratio: float
    decay_share: float
    language_alpha: float

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return self.steps * self.batch_sequences * self.sequence_length

    def sample_seed(self, seed: int) -> int:
        """Seed of the sample order and the dropout: what branches reads in another order than its parent did."""
        return 2 * seed + (self.parent is not None)


def plan_members(recipe: Recipe, cluster_names: Sequence[str]) -> dict[str, Member]:
    """Every member of the run, parents before children.

    Raises:
        RecipeError: a batch that cannot be shared, or totals that are not equal although they must be.
    """
    train, seed = recipe.train, recipe.seed
    k = len(cluster_names)
    if train.language_weights:
        given = {
            "train.language_alpha": train.language_alpha,
            "seed.language_alpha": 1.0 if seed.language_alpha is None else seed.language_alpha,
        }
        for field, alpha in given.items():
            if alpha != 1.0:
                raise RecipeError(
                    f"{field} = {alpha:g} and train.language_weights both say how languages are mixed: leave out one of them, since the "
                    "weights would take the place of the exponent"
                )

    def member(
        name: str, kind: Literal["seed", "dense", "expert"], clusters: tuple[str, ...] | None, steps: int, batch: int, **other: Any
    ) -> Member:
        values: dict[str, Any] = {key: getattr(train, key) for key in (*_RATE, "sequence_length")}
        values |= {key: value for key, value in other.items() if value is not None}
        if values["warmup_steps"] >= steps > 0:
            field = "seed.warmup_steps" if kind == "seed" else "train.warmup_steps"
            raise RecipeError(f"{field} = {values['warmup_steps']} must be below the {steps} steps of `{name}`")
        return Member(name, kind, None if kind == "seed" else "seed", clusters, steps, batch, **values)

    expert_batch = recipe.experts.batch_sequences
    if expert_batch is None:
        if train.batch_sequences % k:
            raise RecipeError(
                f"train.batch_sequences = {train.batch_sequences} is not a multiple of the {k} clusters, so the experts cannot share "
                f"the batch equally: choose {max(k, round(train.batch_sequences / k) * k)}, for example"
            )
        expert_batch = train.batch_sequences // k
    expert_steps = recipe.experts.steps or train.steps

    seed_steps = 0 if seed.load else (seed.steps or train.steps)
    overrides = {key: getattr(seed, key) for key in _RATE}
    members = {"seed": member("seed", "seed", None, seed_steps, train.batch_sequences, **overrides)}
    if recipe.experts.dense:
        members["dense"] = member("dense", "dense", None, train.steps, train.batch_sequences)
    for name in cluster_names:
        if name in members:
            raise RecipeError(f"a cluster is named `{name}`, which is taken: rename the language or cluster")
        lr = recipe.experts.lora.lr if recipe.experts.kind == "lora" else None
        members[name] = member(name, "expert", (name,), expert_steps, expert_batch, lr=lr)
    _check_equal(recipe, members)
    return members


def check_language_weights(recipe: Recipe, languages: Collection[str]) -> None:
    """Look whether `train.language_weights`, where it is given, has the languages of the corpus and no others.

    Raises:
        RecipeError: naming the languages that are missing or unknown.
    """
    weights = recipe.train.language_weights
    missing = sorted(set(languages) - set(weights)) if weights else []
    unknown = sorted(set(weights) - set(languages))
    if missing:
        raise RecipeError(
            f"train.language_weights has no weight for {', '.join(missing)}: every language that a model trains on needs one; add them, or "
            "leave out train.language_weights"
        )
    if unknown:
        raise RecipeError(
            f"train.language_weights has a weight for {', '.join(unknown)}, of which the corpus has no text: its languages are "
            f"{', '.join(sorted(languages))}; remove or rename them"
        )


def account(members: dict[str, Member]) -> dict[str, Any]:
    """Training tokens by member: {seed_tokens, dense_tokens, expert_tokens: {name: n}, experts_total, total, equal}."""
    experts = {name: item.tokens for name, item in members.items() if item.kind == "expert"}
    dense = members["dense"].tokens if "dense" in members else None
    total = sum(experts.values())
    return {
        "seed_tokens": members["seed"].tokens,
        "dense_tokens": dense,
        "expert_tokens": experts,
        "experts_total": total,
        "total": sum(item.tokens for item in members.values()),
        "equal": dense is None or dense == total,
    }


def account_text(members: dict[str, Member]) -> str:
    """The account in words, for the console."""
    table = account(members)
    each = sorted(set(table["expert_tokens"].values()))
    parts = [f"seed {table['seed_tokens']:,}"]
    if table["dense_tokens"] is not None:
        parts.append(f"dense {table['dense_tokens']:,}")
    parts.append(f"{len(table['expert_tokens'])} experts x {' to '.join(f'{n:,}' for n in each)} = {table['experts_total']:,}")
    verdict = (
        "" if table["dense_tokens"] is None else (" (equal)" if table["equal"] else " (NOT equal, as experts.allow_unequal_tokens asks)")
    )
    return f"training tokens: {'; '.join(parts)}{verdict}; in all {table['total']:,}"


def _check_equal(recipe: Recipe, members: dict[str, Member]) -> None:
    table = account(members)
    if not table["equal"] and not recipe.experts.allow_unequal_tokens:
        raise RecipeError(
            f"the comparison is not equal: dense gets {table['dense_tokens']:,} tokens, the experts together {table['experts_total']:,}. "
            "Leave out experts.batch_sequences and experts.steps, or set experts.allow_unequal_tokens = true"
        )


def lora_settings(recipe: Recipe, member: Member) -> LoraConfig | None:
    """The low-rank deltas that a member is trained as; None where it has weights of its own."""
    return recipe.experts.lora if recipe.experts.kind == "lora" and member.kind == "expert" else None


def member_settings(recipe: Recipe, member: Member) -> dict[str, Any]:
    """What the trained weights of a member depend on in the recipe, for its marker."""
    if member.kind == "seed" and recipe.seed.load:
        return {"seed.load": recipe.seed.load, "export": result_settings(recipe.export)}
    schedule = ("sequence_length", "batch_sequences", "steps", *_RATE)
    common = {key: value for key, value in result_settings(recipe.train).items() if key not in schedule}
    model = result_settings(recipe.model)
    if recipe.model.attention_dropout:
        # Attention dropout is drawn once a micro-batch.
        common["micro_batch_size"] = recipe.train.micro_batch_size
    if member.parent is not None:
        model = {key: model[key] for key in ("dropout", "attention_dropout")}
    settings = {"member": asdict(member), "train": common, "model": model, "export": result_settings(recipe.export)}
    lora = lora_settings(recipe, member)
    # Of a member with weights of its own the marker is what it was before there were deltas.
    return settings if lora is None else settings | {"lora": result_settings(lora)}


def find_member(members: dict[str, Member], name: str) -> Member:
    """The member of that name.

    Raises:
        TrainError: naming those there are.
    """
    if name not in members:
        raise TrainError(f"--expert {name}: this run has {', '.join(members)}")
    return members[name]
