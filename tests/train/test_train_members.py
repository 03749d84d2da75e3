from dataclasses import replace

import pytest

from megaxelm.errors import RecipeError, TrainError
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.train.members import account, account_text, find_member, member_settings, plan_members
from megaxelm.train.schedule import learning_rate


def recipe(**sections: dict) -> Recipe:
    return parse_recipe({"name": "tiny", "corpus": {"train": "x.jsonl"}, "clusters": {"k": 4}} | sections)


def test_experts_share_the_batch_and_get_the_tokens_of_the_dense_model_together() -> None:
    members = plan_members(recipe(train={"batch_sequences": 16, "steps": 10, "sequence_length": 32}), ["a", "b", "c", "d"])
    assert list(members) == ["seed", "dense", "a", "b", "c", "d"]
    assert members["dense"].batch_sequences == 16 and members["a"].batch_sequences == 4
    assert members["dense"].steps == members["a"].steps == 10
    assert members["dense"].tokens == sum(members[name].tokens for name in "abcd") == 16 * 10 * 32
    assert [members[name].parent for name in ("seed", "dense", "a")] == [None, "seed", "seed"]
    assert account(members)["equal"]
    assert "(equal); in all 15,360" in account_text(members)


@pytest.mark.parametrize("experts", [{"batch_sequences": 16}, {"steps": 11}])
def test_an_unequal_comparison_is_refused_unless_asked_for(experts: dict) -> None:
    with pytest.raises(RecipeError, match="not equal.*allow_unequal_tokens"):
        plan_members(recipe(experts=experts), list("abcd"))
    members = plan_members(recipe(experts=experts | {"allow_unequal_tokens": True}), list("abcd"))
    assert not account(members)["equal"] and "NOT equal" in account_text(members)


def test_without_a_dense_baseline_there_is_nothing_to_compare() -> None:
    members = plan_members(recipe(experts={"dense": False, "steps": 7}, seed={"steps": 3}), list("abcd"))
    assert "dense" not in members and account(members)["dense_tokens"] is None


def test_a_loaded_seed_is_trained_no_further() -> None:
    members = plan_members(recipe(seed={"load": "some/folder"}, tokenizer={"load": "some/folder"}), list("abcd"))
    assert members["seed"].tokens == 0
    assert (
        member_settings(recipe(seed={"load": "some/folder"}, tokenizer={"load": "some/folder"}), members["seed"])["seed.load"]
        == "some/folder"
    )


def test_a_cluster_named_like_another_member_is_refused() -> None:
    with pytest.raises(RecipeError, match="`dense`, which is taken"):
        plan_members(recipe(), ["dense", "b", "c", "d"])


def test_an_unknown_expert_is_told_the_names_there_are() -> None:
    with pytest.raises(TrainError, match="seed, dense, a, b"):
        find_member(plan_members(recipe(), list("abcd")), "e")


def test_what_an_expert_depends_on() -> None:
    base = recipe()
    member = plan_members(base, list("abcd"))["a"]
    other = recipe(model={"hidden_size": 128}, train={"log_every": 3, "checkpoint_every": 2})
    assert member_settings(base, member) == member_settings(other, plan_members(other, list("abcd"))["a"])
    changed = recipe(train={"lr": 1e-4})
    assert member_settings(base, member) != member_settings(changed, plan_members(changed, list("abcd"))["a"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "final_lr_ratio": 0.2}, [1.0, 0.8, 0.6, 0.4]),
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"schedule": "linear", "warmup_steps": 2}, [1 / 3, 2 / 3, 1.0, 0.5]),
    ],
)
def test_learning_rate_by_step(settings: dict, expected: list[float]) -> None:
    member = plan_members(recipe(train={"lr": 1.0, "steps": 4} | settings), list("abcd"))["a"]
    assert [learning_rate(member, step) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_wsd_stays_at_the_peak_and_falls_at_the_end() -> None:
    shape = {"schedule": "wsd", "decay_share": 0.25, "final_lr_ratio": 0.1, "warmup_steps": 4, "lr": 1.0, "steps": 20}
    member = plan_members(recipe(train=shape), list("abcd"))["dense"]
    rates = [learning_rate(member, step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28])
    short = replace(member, decay_share=1.0)
    assert learning_rate(short, 4) == 1.0 and learning_rate(short, 12) == pytest.approx(0.55), "the decay begins after the warm-up"
