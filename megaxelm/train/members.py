"""What is trained: seed, dense baseline and the experts of each round, as a graph in which each knows its parent; the account of tokens.

Equal compute (paper, section 4.1): the dense model gets the whole batch, each of k experts 1/k of the batch for the same steps. With rounds
the steps of all rounds together are those of the dense model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megaxelm.errors import RecipeError, TrainError
from megaxelm.files import read_json
from megaxelm.recipe import LoraConfig, Recipe, result_settings
from megaxelm.run import RunFolder
from megaxelm.train.rounds import Level, expected_levels, plan_rounds

_RATE = ("lr", "schedule", "warmup_steps", "final_lr_ratio", "decay_share", "language_alpha")


@dataclass(frozen=True)
class Member:
    """One model of the run and how it is trained. `clusters` is None for the whole corpus; a loaded seed has `steps` 0.

    `round`: 0 for the seed, 1 for what branches from it, one more for each expert further down. An expert of a round before the last holds
    the clusters of all that branch from it.
    """

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
    round: int = 1

    @property
    def is_leaf(self) -> bool:
        """Whether this is the expert of a cluster, and so one of the ensemble; experts of rounds before the last are not."""
        return self.kind == "expert" and self.clusters == (self.name,)

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return self.steps * self.batch_sequences * self.sequence_length

    def sample_seed(self, seed: int) -> int:
        """Seed of the sample order and the dropout: what branches reads in another order than its parent did."""
        # `train.seed` is below 2^32, so seeds of later rounds are no other recipe's.
        return 2 * seed + (self.parent is not None) + (max(self.round, 1) - 1) * 2**33


def members_of_run(run: RunFolder, recipe: Recipe) -> dict[str, Member]:
    """Every member of a run whose clusters are made, as `plan_members`.

    Raises:
        StageError: the clusters are missing, or made for other rounds.
    """
    report = read_json(run.folder("clusters") / "report.json", names=list)
    return plan_members(recipe, report["names"], report.get("rounds", {}).get("levels", []))


def expected_members(recipe: Recipe, cluster_names: Sequence[str]) -> dict[str, Member]:
    """Members of a run whose clusters are not made yet: right in number, order and size, with stand-ins for names that are not known."""
    return plan_members(recipe, cluster_names, expected_levels(recipe, cluster_names))


def plan_members(recipe: Recipe, cluster_names: Sequence[str], levels: Sequence[Level] = ()) -> dict[str, Member]:
    """Every member of the run: seed, dense, then the experts round by round, so parents before children.

    Args:
        levels: divisions of the rounds before the last, coarsest first (`rounds.levels` of the clusters' report).

    Raises:
        RecipeError: a batch that cannot be shared, or totals that are not equal although they must be.
        StageError: `levels` are not those of the recipe's rounds.
    """
    train, seed = recipe.train, recipe.seed
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
        name: str,
        kind: Literal["seed", "dense", "expert"],
        clusters: tuple[str, ...] | None,
        steps: int,
        batch: int,
        parent: str | None = "seed",
        number: int = 1,
        **other: Any,
    ) -> Member:
        values: dict[str, Any] = {key: getattr(train, key) for key in (*_RATE, "sequence_length")}
        values |= {key: value for key, value in other.items() if value is not None}
        if values["warmup_steps"] >= steps > 0:
            field = "seed.warmup_steps" if kind == "seed" else "train.warmup_steps"
            if recipe.rounds and kind == "expert":
                field = f"warmup_steps of round {number} (train.warmup_steps, or its own in rounds)"
            raise RecipeError(f"{field} = {values['warmup_steps']} must be below the {steps} steps of `{name}`")
        return Member(name, kind, parent, clusters, steps, batch, round=number, **values)

    seed_steps = 0 if seed.load else (seed.steps or train.steps)
    overrides = {key: getattr(seed, key) for key in _RATE}
    members = {"seed": member("seed", "seed", None, seed_steps, train.batch_sequences, None, 0, **overrides)}
    if recipe.experts.dense:
        members["dense"] = member("dense", "dense", None, train.steps, train.batch_sequences)
    parents = dict.fromkeys(cluster_names, "seed")
    lora_rate = {"lr": recipe.experts.lora.lr} if recipe.experts.kind == "lora" else {}
    for number, item in enumerate(plan_rounds(recipe, cluster_names, levels), 1):
        for name, clusters in item.experts.items():
            if name in members:
                raise RecipeError(f"a cluster is named `{name}`, which is taken: rename the language or cluster")
            rate = item.rate | lora_rate
            members[name] = member(name, "expert", clusters, item.steps, item.batch_sequences, parents[clusters[0]], number, **rate)
        parents = {cluster: name for name, clusters in item.experts.items() for cluster in clusters}
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
    """Training tokens by member: {seed_tokens, dense_tokens, expert_tokens: {name: n}, experts_total, total, equal}.

    The experts are those of all rounds, each with the tokens of its own training.
    """
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
    parts = [f"seed {table['seed_tokens']:,}"]
    if table["dense_tokens"] is not None:
        parts.append(f"dense {table['dense_tokens']:,}")
    rounds = []
    for number in range(1, 1 + max((item.round for item in members.values()), default=0)):
        tokens = [item.tokens for item in members.values() if item.kind == "expert" and item.round == number]
        rounds.append(f"{len(tokens)} experts x {' to '.join(f'{n:,}' for n in sorted(set(tokens)))}")
    parts.append(f"{', then '.join(rounds)} = {table['experts_total']:,}")
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
    own = asdict(member)
    if member.round <= 1:
        del own["round"]  # as in the markers of runs that know of no rounds
    settings = {"member": own, "train": common, "model": model, "export": result_settings(recipe.export)}
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


def line_of(members: dict[str, Member], name: str) -> list[str]:
    """A member and those it comes from, the seed first."""
    line: list[str] = []
    at: str | None = name
    while at is not None:
        line.insert(0, at)
        at = members[at].parent
    return line


def training_rounds(members: dict[str, Member], only: str | None = None) -> list[list[str]]:
    """Names of what is trained after the seed, round by round. The dense model is of the last one, or later rounds would wait for it.

    Args:
        only: this member and those it comes from.
    """
    last = max(member.round for member in members.values())
    wanted = members if only is None else line_of(members, only)
    rounds: list[list[str]] = [[] for _ in range(last + 1)]
    for name in wanted:
        rounds[last if members[name].kind == "dense" else members[name].round].append(name)
    return rounds[1:]
