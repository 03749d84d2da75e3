"""What a growth is planned from, who may be the donor, and how the models are trained in turn; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from growing import write_index
from safetensors.numpy import save_file

import megaxelm.grow.make as make
import megaxelm.grow.study as study
from megaxelm.errors import GrowError, StageError
from megaxelm.files import write_json
from megaxelm.grow.child import ChildPlan
from megaxelm.grow.donors import Candidate, find_candidates
from megaxelm.grow.make import GrowOptions
from megaxelm.growth import FOLDER, Grown, Growth, read_growth, write_growth
from megaxelm.lineage import read_history
from megaxelm.recipe import Recipe, dump_recipe, parse_recipe
from megaxelm.run import RunFolder

AZ, UK = Grown("az", ("az",), "c0", "expert", "h"), Grown("uk", ("uk",), "az", "expert", "h")


def recipe_of(train: str = "b.jsonl", **corpus: Any) -> Recipe:
    return parse_recipe({"name": "p", "corpus": {"train": train} | corpus, "clusters": {"k": 2}})


def candidate(name: str, *languages: str, **tokens: int) -> Candidate:
    return Candidate(name, languages, tokens, Path("run") / name / "export")


@pytest.mark.parametrize("dropped", [Growth(), Growth((), ("de", "ru"), ("c0",))])
def test_candidates_are_as_near_and_have_as_much_text_whatever_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: Growth
) -> None:
    write_index(tmp_path / "index", {"c0": {"de": 5, "ru": 3}, "c1": {"ru": 1, "zh": 4}})
    partitioner = SimpleNamespace(names=["c0", "c1"], languages=lambda: None)
    monkeypatch.setattr("megaxelm.cluster.load.load_partitioner", lambda folder, tokenizer: partitioner)
    found = find_candidates(recipe_of(), tmp_path, dropped, None)  # type: ignore[arg-type]
    assert {name: item.languages for name, item in found.items()} == {"c0": ("de", "ru"), "c1": ("zh",), "dense": (), "seed": ()}
    assert found["dense"].tokens == found["seed"].tokens == {"de": 5, "ru": 4, "zh": 4}


def test_a_rule_chooses_among_those_that_were_there_and_are_not_dropped() -> None:
    models = {item.name: item for item in (candidate("c0", "de"), candidate("c1", "zh"), candidate("az", "az"), candidate("uk", "uk"))}
    models |= {"dense": candidate("dense"), "seed": candidate("seed")}

    def names(name: str, *group: str, dropped: str = "") -> list[str]:
        return make._rule_names(name, group, Growth((AZ, UK), dropped_experts=tuple(dropped.split())), models)

    assert names("pl", "pl") == ["c0", "c1", "az", "uk"]
    assert names("uk", "uk") == ["c0", "c1", "az"] and names("az", "az") == ["c0", "c1"]
    assert names("pl", "pl", dropped="c0 az") == ["c1", "uk"]
    assert names("az-pl", "az", "pl") == ["c0", "c1", "uk"]  # who was grown for a language is no donor of it
    assert names("de", "de") == ["c0", "c1", "az", "uk"]  # the run's own expert, of which it was dropped, is


def plans_of(monkeypatch: pytest.MonkeyPatch, donor: str = "c0", growth: Growth | None = None, **options: Any) -> list[Any]:
    monkeypatch.setattr(make, "_sources", lambda *given: (["train"], ["valid"]))
    monkeypatch.setattr(make, "model_hash", lambda export: f"hash of {export.parent.name}")
    found = SimpleNamespace(choice=SimpleNamespace(name=donor), tokens={"pl": 10.0}, languages=("pl",), name="pl")
    models = {item.name: item for item in (candidate("c0", de=4), candidate("az", az=3, de=1), candidate("dense", de=9), candidate("seed"))}
    member = SimpleNamespace(steps=6, batch_sequences=4)
    growth = growth or Growth((AZ, UK))
    return make._plan(RunFolder(Path("run")), recipe_of(), found, models, member, growth, GrowOptions(["pl"], **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "planned"), [(None, 6), (9, 9)])
def test_comparisons_differ_from_the_expert_in_their_parent_alone(monkeypatch: pytest.MonkeyPatch, steps: int | None, planned: int) -> None:
    plans = plans_of(monkeypatch, "az", steps=steps, lapt=True)
    assert [(entry.name, entry.kind, entry.donor, entry.donor_weights) for entry, _ in plans] == [
        ("pl", "expert", "az", "hash of az"),
        ("pl-lapt-dense", "lapt", "dense", "hash of dense"),
        ("pl-lapt-seed", "lapt", "seed", "hash of seed"),
    ]
    first = plans[0][1]
    assert (first.steps, first.batch_sequences, first.generation, list(first.weights)) == (planned, 4, 2, ["pl", "az", "de"])
    for entry, plan in plans:
        expected = vars(first) | {"name": entry.name, "donor": entry.donor, "donor_export": Path("run") / entry.donor / "export"}
        assert vars(plan) == expected


def test_replay_of_a_donor_without_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GrowError, match="the donor seed has no text of other languages to replay; give --replay 0"):
        plans_of(monkeypatch, "seed")
    assert [dict(plan.weights) for _, plan in plans_of(monkeypatch, "seed", replay=0.0)] == [{"pl": 1.0}]


def files_of(sources: list[Any]) -> list[str]:
    return [Path(item["files"][0]).name for item in sources]


def test_text_that_was_given_stands_before_the_runs_and_a_grown_donors(tmp_path: Path) -> None:
    for name in ("own", "az", "pl", "own_valid", "az_valid", "pl_valid"):
        (tmp_path / f"{name}.jsonl").write_text("")

    def path(name: str) -> str:
        return f"{tmp_path}/{name}.jsonl"

    recipe = recipe_of(path("own"), valid=path("own_valid"))
    child = tmp_path / "run" / FOLDER / "az"
    child.mkdir(parents=True)
    (child / "recipe.yaml").write_text(
        dump_recipe(recipe_of(train=[path("az"), path("own")], valid=[path("az_valid"), path("own_valid")]))  # type: ignore[arg-type]
    )
    run = RunFolder(tmp_path / "run")

    def sources(donor: str, replays: bool, *corpus: str, valid: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
        options = GrowOptions(["pl"], [path(name) for name in corpus], [path(name) for name in valid])
        train, held_out = make._sources(run, recipe, donor, replays, Growth((AZ,)), options)
        return files_of(train), files_of(held_out)

    assert sources("c0", True) == (["own.jsonl"], ["own_valid.jsonl"])
    assert sources("az", True) == (["own.jsonl", "az.jsonl"], ["own_valid.jsonl", "az_valid.jsonl"])
    assert sources("az", True, "pl", valid=("pl_valid",)) == (
        ["pl.jsonl", "own.jsonl", "az.jsonl"],
        ["pl_valid.jsonl", "own_valid.jsonl", "az_valid.jsonl"],
    )
    assert sources("c0", False, "pl", valid=("pl_valid",)) == (["pl.jsonl"], ["pl_valid.jsonl"])
    assert sources("c0", False, "pl") == (["pl.jsonl"], ["own_valid.jsonl"])
    # The file that the donor was given holds the new language too: it is read once.
    assert sources("az", True, "az")[0] == ["az.jsonl", "own.jsonl"]
    with pytest.raises(GrowError, match="own.jsonl is a source of the run already"):
        sources("az", True, "own")


def test_one_known_text_is_enough_for_the_vector_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router = tmp_path / "ensemble" / "router"
    router.mkdir(parents=True)
    vectors = np.array([[0.0, 0.0], [0.0, 0.1]])
    space = SimpleNamespace(transform=lambda texts: vectors[: len(texts)])
    monkeypatch.setattr("megaxelm.cluster.space.TfidfSpace.load", lambda *given: space)
    assert study.space_notes(tmp_path, "az", None, {"az": ["x"]}, []) == []  # type: ignore[arg-type]  # no centres: no such router
    save_file({"centres": np.zeros((1, 2))}, router / "centres.safetensors")
    write_json(tmp_path / "ensemble" / "config.json", {"experts": [{"name": "c0"}]})
    assert study.space_notes(tmp_path, "az", None, {"az": ["x", "y"]}, []) == []  # type: ignore[arg-type]
    with pytest.raises(GrowError, match="az: the vector space of the router tfidf knows no term"):
        study.space_notes(tmp_path, "az", None, {"az": ["x"]}, [])  # type: ignore[arg-type]


class Child:
    """Stands for the stages of a child run: training it gives its model the weights `<name> from <the donor's weights>`."""

    def __init__(self, family: Family, name: str, donor: str) -> None:
        self.family, self.name, self.donor = family, name, donor
        self.folder = SimpleNamespace(path=family.path / FOLDER / name)

    def _wanted(self) -> str:
        return f"{self.name} from {self.family.weights[self.donor]}"

    def is_fresh(self, stage: str) -> bool:
        return self.family.weights.get(self.name) == self._wanted()

    def run(self, until: str) -> None:
        if self.name == self.family.dies:
            raise KeyboardInterrupt
        self.family.weights |= {self.name: self._wanted()} | self.family.meddle


class Family:
    """The models of a run and their weights, of which `Child` makes some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = {"c0": "1", "c1": "2"}
        self.meddle: dict[str, str] = {}
        self.dies = ""
        self.said: list[str] = []
        self.checked: list[str] = []
        """Children whose tokenizer was looked at."""

    def train(self, **donors: str) -> bool:
        plans = [
            (
                Grown(name, (name,), donor, "expert", "of before"),
                ChildPlan(name, (name,), donor, self.path / donor / "export", {}, 1, 1, []),
            )
            for name, donor in donors.items()
        ]
        return make._train(RunFolder(self.path), plans, [recipe_of()] * len(plans), self.said.append)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    found = Family(tmp_path)
    donors = {"az": "c0", "uk": "az", "pl": "c1"}
    monkeypatch.setattr(make, "_child_stages", lambda folder, name, recipe, say: Child(found, name, donors[name]))
    monkeypatch.setattr(make, "_check_tokenizer", lambda folder, child: found.checked.append(child.path.name))
    monkeypatch.setattr(make, "model_hash", lambda export: found.weights[export.parent.name])
    for module in ("make", "proof"):
        monkeypatch.setattr(f"megaxelm.grow.{module}.model_hashes", lambda path: dict(found.weights))
    return found


def test_a_donor_that_is_made_again_just_before_makes_its_child_again_too(family: Family) -> None:
    assert family.train(az="c0", uk="az") and not family.train(az="c0", uk="az")
    family.weights["c0"] = "3"
    assert family.train(az="c0", uk="az")
    assert family.weights["uk"] == "uk from az from 3" and family.checked == ["az", "uk"] * 2
    assert [item.donor_weights for item in read_growth(family.path).grown] == ["3", "az from 3"]
    assert [event["changed"] for event in read_history(family.path)] == [[], ["az", "uk"]]


def test_what_was_trained_before_a_stop_is_proved_and_entered(family: Family) -> None:
    family.dies = "pl"
    with pytest.raises(KeyboardInterrupt):
        family.train(az="c0", pl="c1")
    assert read_growth(family.path).names == ["az"]
    family.dies = ""
    assert family.train(az="c0", pl="c1")
    events = [(event["what"], event["new"], sorted(event["before"])) for event in read_history(family.path)]
    assert events == [("grow az", ["az"], ["c0", "c1"]), ("grow pl", ["pl"], ["az", "c0", "c1"])]


@pytest.mark.parametrize("meddled", [{"c1": "other"}, {"az": "other"}])
def test_a_model_that_others_changed_is_told_and_written_down(family: Family, meddled: dict[str, str]) -> None:
    family.train(az="c0")
    family.meddle = meddled
    with pytest.raises(GrowError, match=f"the weights of {next(iter(meddled))} are not what they were"):
        family.train(az="c0", pl="c1")
    assert [event["changed"] for event in read_history(family.path)] == [[], list(meddled)]


def test_a_model_that_is_gone_is_told(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Child.run
    monkeypatch.setattr(Child, "run", lambda child, until: (run(child, until), family.weights.pop("c1")))
    with pytest.raises(GrowError, match="the weights of c1 are not what they were"):
        family.train(az="c0")


def test_entering_keeps_the_place_and_brings_back_what_the_expert_is_for(tmp_path: Path) -> None:
    again = Grown("az", ("az",), "c1", "expert", "other")
    write_growth(tmp_path, Growth((AZ, UK), ("az", "de"), ("c0",)))
    make._enter(tmp_path, Grown("az-lapt-seed", ("az",), "seed", "lapt", "h"))
    assert read_growth(tmp_path).dropped_languages == ("az", "de")  # a comparison holds nothing
    make._enter(tmp_path, again)
    found = read_growth(tmp_path)
    assert found.names == ["az", "uk", "az-lapt-seed"] and found.find("az") == again
    assert (found.dropped_languages, found.dropped_experts) == (("de",), ("c0",))


def test_a_language_that_is_grown_alone_leaves_the_group_that_it_was_dropped_of(tmp_path: Path) -> None:
    group, gone = (Grown(name, tuple(name.split("-")), "c0", "expert", "h") for name in ("az-uk", "az-pl"))
    compared = Grown("az-uk-lapt-seed", ("az", "uk"), "seed", "lapt", "h")
    write_growth(tmp_path, Growth((group, gone, compared), ("az",), ("az-pl",)))
    make._enter(tmp_path, AZ)
    found = read_growth(tmp_path)
    assert {item.name: item.languages for item in found.grown} == {
        "az-uk": ("uk",),
        "az-pl": ("az", "pl"),  # not in the ensemble
        "az-uk-lapt-seed": ("az", "uk"),
        "az": ("az",),
    }
    assert found.dropped_languages == ()


def test_nobody_grows_while_another_does(tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock(FOLDER), pytest.raises(StageError, match="another megaxelm works here"):
        make.grow(RunFolder(tmp_path), recipe_of(), GrowOptions(["az"]))


def test_a_child_of_another_tokenizer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = {"run": {"a": 0}, "child": {"a": 0}}

    def load(folder: Path) -> Any:
        return SimpleNamespace(hf=SimpleNamespace(get_vocab=lambda: pieces[folder.parent.name]))

    monkeypatch.setattr("megaxelm.corpus.tokenizer.Tokenizer.load", load)
    run, child = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "child")
    make._check_tokenizer(run, child)
    pieces["child"] = {"b": 0}
    with pytest.raises(GrowError, match="its tokenizer has other pieces than the run's.*grow once more"):
        make._check_tokenizer(run, child)
