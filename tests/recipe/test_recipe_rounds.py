"""Rounds in a recipe: how many steps each gets, and which lists of rounds are none."""

from typing import Any

import pytest

from megaxelm.errors import RecipeError
from megaxelm.recipe import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_docs, round_steps


def recipe(rounds: list[dict[str, Any]], **sections: Any) -> Recipe:
    tree = {"name": "t", "corpus": {"train": "x.jsonl"}, "clusters": {"k": 16}, "train": {"steps": 100, "batch_sequences": 16}}
    return parse_recipe(
        {key: tree.get(key, {}) | value if isinstance(value, dict) else value for key, value in (tree | sections).items()}
        | {"rounds": rounds}
    )


@pytest.mark.parametrize(
    ("rounds", "steps"),
    [
        ([{"k": 16}], [100]),
        ([{"k": 4}, {"k": 16}], [50, 50]),
        ([{"k": 4}, {"k": 8}, {"k": 16}], [33, 34, 33]),
        ([{"k": 4, "steps": 70}, {"k": 8}, {"k": 16}], [70, 15, 15]),
        ([{"k": 4, "share": 0.5}, {"k": 8, "steps": 20}, {"k": 16}], [50, 20, 30]),
        ([{"k": 4, "share": 0.3333}, {"k": 8, "share": 0.3333}, {"k": 16, "share": 0.3333}], [33, 34, 33]),
        ([{"k": 4, "share": 0.125}, {"k": 8, "steps": 1}, {"k": 16}], [13, 1, 86]),
    ],
)
def test_rounds_have_the_steps_of_the_flat_run_together(rounds: list[dict[str, Any]], steps: list[int]) -> None:
    made = recipe(rounds)
    assert round_steps(made.rounds, 100) == steps and sum(steps) == 100


def test_the_steps_are_those_of_experts_steps_where_it_is_given() -> None:
    made = recipe([{"k": 4, "steps": 20}, {"k": 16, "steps": 20}], experts={"steps": 40, "allow_unequal_tokens": True})
    assert round_steps(made.rounds, 40) == [20, 20]
    with pytest.raises(RecipeError, match=r"come to 40 \(20 \+ 20\), while flat training has 100.*allow_unequal_tokens"):
        recipe([{"k": 4, "steps": 20}, {"k": 16, "steps": 20}])


@pytest.mark.parametrize(
    ("rounds", "sections", "words"),
    [
        ([{"k": 4}, {"k": 8}], {}, "the last has k = 8, and there are 16 clusters"),
        ([{"k": 8}, {"k": 4}, {"k": 16}], {}, "k = 4 after k = 8"),
        ([{"k": 16}, {"k": 16}], {}, "k = 16 after k = 16"),
        ([{"k": 3}, {"k": 16}], {}, "is not a multiple of k = 3.*choose a multiple of 48"),
        ([{"k": 4, "steps": 5, "share": 0.1}, {"k": 16}], {}, "steps = 5 and share = 0.1: give one of them"),
        ([{"k": 4, "steps": 100}, {"k": 16}], {}, "100 of 100 steps.*the other 1 would have none"),
        ([{"k": 4, "share": 0.001}, {"k": 16}], {}, "share = 0.001 of 100 steps is not one step of the round with k = 4"),
        ([{"k": 4, "steps": 60}, {"k": 16, "steps": 60}], {}, r"come to 120 \(60 \+ 60\)"),
        ([{"k": 4}, {"k": 16}], {"experts": {"batch_sequences": 2}}, "experts.batch_sequences = 2 and rounds"),
        ([{"k": 4}, {"k": 16}], {"clusters": {"partitioner": "random"}}, "clusters.partitioner = random has no tree"),
        ([{"k": 4, "step": 5}, {"k": 16}], {}, "rounds.0.step: unknown key; did you mean `steps`"),
        ([{"k": 0}, {"k": 16}], {}, "rounds.0.k = 0"),
    ],
)
def test_rounds_that_do_not_add_up_are_refused(rounds: list[dict[str, Any]], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(rounds, **sections)


def test_one_round_may_be_of_random_clusters() -> None:
    assert recipe([{"k": 16}], clusters={"partitioner": "random"}).rounds[0].k == 16


def test_rounds_are_written_and_read_and_documented(tmp_path: Any) -> None:
    made = recipe([{"k": 4, "lr": 1e-3}, {"k": 16, "schedule": "constant"}])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    assert load_recipe(tmp_path / "recipe.yaml") == made
    given = load_recipe(tmp_path / "recipe.yaml", ["rounds=[{k: 2}, {k: 16}]"])
    assert [item.k for item in given.rounds] == [2, 16]
    assert "## `rounds[]`" in recipe_docs() and "| `rounds` | list of rounds | `[]` |" in recipe_docs()
