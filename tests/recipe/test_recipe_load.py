from pathlib import Path

import pytest
import yaml

from megaxelm.errors import RecipeError
from megaxelm.recipe import dump_recipe, load_recipe, parse_recipe, recipe_docs, result_settings

REPOSITORY = Path(__file__).resolve().parents[2]
MINIMAL = {"name": "tiny", "corpus": {"train": "text/*.jsonl"}, "clusters": {"k": 2}}


def with_values(**sections: dict) -> dict:
    tree = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree


@pytest.mark.parametrize(
    "path",
    sorted([*(REPOSITORY / "recipes").glob("*.yaml"), *(REPOSITORY / "recipes" / "evidence").glob("*.yaml")]),
    ids=lambda path: path.stem,
)
def test_every_recipe_of_the_project_loads_and_survives_being_resolved(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (with_values(train={"warmup_step": 3}), ["train.warmup_step", "did you mean `warmup_steps`"]),
        (MINIMAL | {"tokeniser": {}}, ["tokeniser", "did you mean `tokenizer`"]),
        (with_values(corpus={"train": [{"catalog": ["x"]}]}), ["corpus.train.0.catalog", "did you mean `catalogs`"]),
        (with_values(corpus={"train": [{"files": "a", "formt": "text"}]}), ["corpus.train.0.formt", "did you mean `format`"]),
        (with_values(train={"lr": -1}), ["train.lr = -1", "greater than 0"]),
        (with_values(train={"schedule": "lineal"}), ["train.schedule = 'lineal'", "'linear', 'cosine'"]),
        (with_values(train={"batch_sequences": 7}), ["train.batch_sequences = 7", "clusters.k = 2", "choose 8"]),
        (with_values(train={"sequence_length": 4096}), ["train.sequence_length = 4096", "model.max_positions = 2048"]),
        (with_values(clusters={"k": None}), ["clusters.k is missing"]),
        (with_values(tokenizer={"begin_of_document": False}), ["train.document_mask", "begin_of_document"]),
        ({"name": "tiny", "clusters": {"k": 2}}, ["corpus: missing"]),
        (MINIMAL | {"name": "../up"}, ["name = '../up'"]),
        (with_values(ensemble={"router": "fixed"}), ["ensemble.fixed_weights is empty"]),
        (with_values(corpus={"languages": ["en", "en"]}), ["names en more than once"]),
        (with_values(train={"lr": float("inf")}), ["train.lr", "finite"]),
        (with_values(ensemble={"top_m": 3}), ["ensemble.top_m = 3", "clusters.k = 2"]),
        (with_values(ensemble={"fallback": "dense"}, experts={"dense": False}), ["ensemble.fallback = dense", "experts.dense = true"]),
        (with_values(ensemble={"fallback_weight": 0.5}), ["ensemble.fallback_weight = 0.5"]),
        (with_values(ensemble={"posterior_decay": "halved"}), ["ensemble.posterior_decay = 'halved'"]),
        (with_values(ensemble={"posterior_prior": {"a": 0.0}}), ["ensemble.posterior_prior", "at least one is above 0"]),
        (with_values(ensemble={"posterior_prior": {"a": -1.0, "b": 1.0}}), ["ensemble.posterior_prior", "must not be negative"]),
        (with_values(ensemble={"refresh": "sometimes"}), ["ensemble.refresh", "'token', 'chunk' or 'frozen'"]),
        (with_values(seed={"load": "some/seed"}), ["seed.load is set and tokenizer.load is not"]),
        (with_values(evaluation={"sequence_length": 4096}), ["evaluation.sequence_length = 4096"]),
    ],
)
def test_a_wrong_field_is_named_with_the_rule_and_the_way_out(tree: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(tree)
    for word in words:
        assert word in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(with_values(train={"lr": 0, "stepps": 3}))
    assert "train.lr" in str(error.value) and "train.stepps" in str(error.value)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_are_dotted_and_typed(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["train.lr=2e-3", "corpus.languages=[no, sw]", "corpus.train=a/*.jsonl", "experts.dense=false"])
    assert recipe.train.lr == 2e-3
    assert recipe.corpus.languages == ["no", "sw"]  # Norwegian, not a boolean
    assert recipe.corpus.train[0].files == ["a/*.jsonl"]
    assert recipe.experts.dense is False


@pytest.mark.parametrize("override", ["train.lr", "=3", "name.x=3", "train..lr=3", "train.lr=[1"])
def test_a_broken_override_is_an_error(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(recipe_file(tmp_path, yaml.safe_dump(MINIMAL)), [override])


@pytest.mark.parametrize("text", ["a: [1", "- just\n- a list\n", "name: a\nname: b\n", "\x00"])
def test_broken_yaml_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="recipe.yaml"):
        load_recipe(recipe_file(tmp_path, text))


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_fields_without_effect_stay_out_of_what_results_depend_on() -> None:
    recipe = parse_recipe(MINIMAL)
    settings = result_settings(recipe.train)
    assert "lr" in settings and "log_every" not in settings and "micro_batch_size" not in settings


def test_the_reference_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8") == recipe_docs(), "run `make docs`"


@pytest.mark.parametrize(("given", "decay"), [("cumulative", 1.0), ("one-step", 0.0), (0.7, 0.7)])
def test_decays_have_names(given: str | float, decay: float) -> None:
    assert parse_recipe(with_values(ensemble={"posterior_decay": given})).ensemble.posterior_decay == decay


def test_every_field_has_a_docstring() -> None:
    for line in recipe_docs().splitlines():
        if line.startswith("| `"):
            assert line.rsplit(" | ", 1)[1].strip(" |"), line
