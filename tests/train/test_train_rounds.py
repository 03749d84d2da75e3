"""The members of a run with rounds: who branches from whom, with how many tokens, and in which order it reads."""

from typing import Any

import pytest

from megaxelm.errors import RecipeError, StageError
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.train.members import account, account_text, expected_members, line_of, member_settings, plan_members
from megaxelm.train.rounds import expected_levels

LEVELS = [{"round1-a-b-c": ["a", "b", "c"], "round1-d": ["d"]}]
ROUNDS = [{"k": 2, "steps": 6}, {"k": 4}]


def recipe(rounds: list[dict[str, Any]], **sections: Any) -> Recipe:
    train = {"steps": 10, "batch_sequences": 8, "sequence_length": 32} | sections.pop("train", {})
    return parse_recipe({"name": "t", "corpus": {"train": "x.jsonl"}, "clusters": {"k": 4}, "train": train, "rounds": rounds} | sections)


def test_experts_branch_from_those_of_the_round_before() -> None:
    members = plan_members(recipe(ROUNDS), list("abcd"), LEVELS)
    assert list(members) == ["seed", "dense", "round1-a-b-c", "round1-d", "a", "b", "c", "d"]
    assert {name: (item.parent, item.round) for name, item in members.items()} == {
        "seed": (None, 0), "dense": ("seed", 1), "round1-a-b-c": ("seed", 1), "round1-d": ("seed", 1),
        "a": ("round1-a-b-c", 2), "b": ("round1-a-b-c", 2), "c": ("round1-a-b-c", 2), "d": ("round1-d", 2),
    }  # fmt: skip
    assert members["round1-a-b-c"].clusters == ("a", "b", "c") and members["d"].clusters == ("d",)
    assert [name for name, item in members.items() if item.is_leaf] == list("abcd"), "an expert of one cluster, but not of the last round"
    assert line_of(members, "b") == ["seed", "round1-a-b-c", "b"]


def test_the_rounds_have_the_tokens_of_the_dense_model_together() -> None:
    members = plan_members(recipe(ROUNDS), list("abcd"), LEVELS)
    assert [(members[name].steps, members[name].batch_sequences) for name in ("dense", "round1-d", "d")] == [(10, 8), (6, 4), (4, 2)]
    table = account(members)
    assert table["equal"] and table["experts_total"] == members["dense"].tokens == 10 * 8 * 32
    assert table["expert_tokens"]["round1-d"] == 6 * 4 * 32 and len(table["expert_tokens"]) == 6
    assert "2 experts x 768, then 4 experts x 256 = 2,560 (equal)" in account_text(members)
    unequal = recipe([{"k": 2, "steps": 3}, {"k": 4, "steps": 4}], experts={"allow_unequal_tokens": True})
    assert not account(plan_members(unequal, list("abcd"), LEVELS))["equal"]


def test_each_round_runs_a_schedule_of_its_own() -> None:
    rounds = [{"k": 2, "steps": 6, "lr": 3e-3, "schedule": "constant"}, {"k": 4, "warmup_steps": 1, "final_lr_ratio": 0.5}]
    members = plan_members(recipe(rounds, train={"lr": 1e-3}), list("abcd"), LEVELS)
    inner, leaf = members["round1-d"], members["d"]
    assert (inner.lr, inner.schedule, inner.warmup_steps) == (3e-3, "constant", 0)
    assert (leaf.lr, leaf.schedule, leaf.warmup_steps, leaf.final_lr_ratio) == (1e-3, "linear", 1, 0.5)
    assert members["dense"].lr == 1e-3 and members["dense"].schedule == "linear"
    with pytest.raises(RecipeError, match=r"warmup_steps of round 2 .* = 5 must be below the 4 steps of `a`"):
        plan_members(recipe(ROUNDS, train={"warmup_steps": 5}), list("abcd"), LEVELS)


def test_every_round_reads_in_an_order_of_its_own() -> None:
    members = plan_members(recipe(ROUNDS), list("abcd"), LEVELS)
    seeds = [members[name].sample_seed(seed) for seed in (0, 1, 2**32 - 1) for name in ("seed", "round1-d", "d")]
    assert len(set(seeds)) == 9 and max(seeds) < 2**63
    assert seeds[:2] == [0, 1] and members["dense"].sample_seed(0) == 1, "as in runs without rounds"


def test_markers_of_runs_without_rounds_are_what_they_were() -> None:
    flat = plan_members(recipe([]), list("abcd"))
    known = {
        "name", "kind", "parent", "clusters", "steps", "batch_sequences", "sequence_length", "lr", "schedule", "warmup_steps",
        "final_lr_ratio", "decay_share", "language_alpha",
    }  # fmt: skip
    for name in ("seed", "dense", "a"):
        assert set(member_settings(recipe([]), flat[name])["member"]) == known
    assert flat == plan_members(recipe([{"k": 4}]), list("abcd")), "one round is no other run"
    later = member_settings(recipe(ROUNDS), plan_members(recipe(ROUNDS), list("abcd"), LEVELS)["d"])["member"]
    assert later["round"] == 2 and later["parent"] == "round1-d"


@pytest.mark.parametrize(
    "levels",
    [
        [],
        [{"round1-a": ["a"], "round1-b": ["b"], "round1-c-d": ["c", "d"]}],
        [{"round1-a-b": ["a", "b"], "round1-c": ["c"]}],
        [{"round1-a-b": ["a", "b"], "round1-b-c-d": ["b", "c", "d"]}],
        [*LEVELS, *LEVELS],
    ],
)
def test_clusters_that_were_made_for_other_rounds_are_refused(levels: list[dict[str, list[str]]]) -> None:
    with pytest.raises(StageError, match="not made for rounds of k = 2, 4; make them again"):
        plan_members(recipe(ROUNDS), list("abcd"), levels)


def test_levels_that_are_not_nested_are_refused() -> None:
    levels = [{"x": list("ab"), "y": list("cdefgh")}, {"p": list("ac"), "q": list("bd"), "r": list("ef"), "s": list("gh")}]
    wide = recipe([{"k": 2}, {"k": 4}, {"k": 8}], clusters={"k": 8})
    with pytest.raises(StageError, match="not made for rounds"):
        plan_members(wide, list("abcdefgh"), levels)


def test_another_number_of_clusters_is_refused() -> None:
    free = recipe(ROUNDS, clusters={"partitioner": "language"})
    with pytest.raises(RecipeError, match="the last has k = 4, and there are 2 clusters"):
        plan_members(free, list("ab"), LEVELS)


def test_a_cluster_may_not_be_named_like_an_expert_of_a_round() -> None:
    with pytest.raises(RecipeError, match="`a`, which is taken"):
        plan_members(recipe(ROUNDS), list("abcd"), [{"a": ["a", "b"], "x": ["c", "d"]}])


def test_before_the_clusters_are_made_the_plan_is_right_in_number() -> None:
    wide = recipe([{"k": 3}, {"k": 5}, {"k": 12}], clusters={"k": 12}, train={"batch_sequences": 60})
    names = [f"cluster-{number}" for number in range(12)]
    assert [len(level) for level in expected_levels(wide, names)] == [3, 5]
    members = expected_members(wide, names)
    assert len(members) == 2 + 3 + 5 + 12 and account(members)["equal"]
    assert [item.round for item in members.values()][2:] == [1] * 3 + [2] * 5 + [3] * 12
    assert expected_members(recipe([]), list("abcd")) == plan_members(recipe([]), list("abcd"))
