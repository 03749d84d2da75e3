"""Who leaves and who comes back, on records alone: the stages that would be made again are only noted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from growing import write_index

from megaxelm.errors import GrowError, MegaxelmError, StageError
from megaxelm.grow.drop import drop
from megaxelm.growth import FOLDER, Grown, Growth, held_clusters, read_growth, write_growth
from megaxelm.recipe import parse_recipe
from megaxelm.run import RunFolder

RECIPE = parse_recipe({"name": "p", "corpus": {"train": "b.jsonl"}, "clusters": {"k": 2}})
AZ, AZ_UK = Grown("az", ("az",), "c0", "expert", "h"), Grown("az-uk", ("az", "uk"), "c0", "expert", "h")
SEED, DENSE = Grown("az-lapt-seed", ("az",), "seed", "lapt", "h"), Grown("az-lapt-dense", ("az",), "dense", "lapt", "h")


class Noted:
    """Stands for `Stages`."""

    made: list[str]
    refused = ""

    def __init__(self, folder: object, recipe: object, say: object, check_sources: bool) -> None:
        assert not check_sources  # a run that was moved has no sources

    def make_one(self, stage: str) -> bool:
        if stage == self.refused:
            raise MegaxelmError(f"{stage} cannot be made")
        self.made.append(stage)
        return True


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experts of documents, which share Russian."""
    write_index(tmp_path / "index", {"c0": {"de": 5, "ru": 3}, "c1": {"ru": 1, "zh": 4}})
    monkeypatch.setattr(Noted, "made", [], raising=False)
    monkeypatch.setattr("megaxelm.stages.Stages", Noted)
    return tmp_path


def grown(run: Path, *items: Grown, dropped: tuple[str, str] = ("", "")) -> Growth:
    """Write what was grown, and the languages and experts that are dropped."""
    for item in items:
        write_index(run / "grown" / item.name / "index", {item.name: dict.fromkeys([*item.languages, "de"], 3)})
    growth = Growth(items, *(tuple(names.split()) for names in dropped))
    write_growth(run, growth)
    return growth


def ask(run: Path, languages: str = "", experts: str = "", undo: bool = False) -> list[str]:
    said: list[str] = []
    drop(RunFolder(run), RECIPE, languages.split(), experts.split(), undo, said.append)
    return said


def dropped(run: Path) -> tuple[Sequence[str], Sequence[str]]:
    growth = read_growth(run)
    return growth.dropped_languages, growth.dropped_experts


def test_an_expert_takes_along_only_languages_that_nobody_else_holds(run: Path) -> None:
    said = ask(run, experts="c0")
    assert dropped(run) == (("de",), ("c0",))
    assert Noted.made == ["ensemble", "evaluation", "report"]
    assert said == [
        "`c0` leaves ensemble, routers and evaluation",
        f"to get it back (its files stay in {run}/experts/c0): megaxelm drop {run} --experts c0 --undo",
    ]
    assert ask(run, experts="c0", undo=True) == ["`c0` is back", "de is back"]
    assert not (run / "growth.json").exists()


def test_a_language_leaves_every_expert_and_takes_along_those_that_have_no_other(run: Path) -> None:
    ask(run, "de ru")
    assert dropped(run) == (("de", "ru"), ("c0",))
    ask(run, "de", undo=True)
    assert dropped(run) == (("ru",), ())


@pytest.mark.parametrize(
    ("items", "before", "languages", "experts"),
    [
        pytest.param((AZ, AZ_UK), ("", "az"), "az uk", "", id="both languages of the one that took another's place"),
        pytest.param((AZ, AZ_UK), ("", "az"), "az", "", id="one of its languages"),
        pytest.param((AZ, AZ_UK), ("", "az"), "", "az-uk", id="it by name"),
        pytest.param((AZ, SEED, DENSE), ("", "az-lapt-seed"), "az", "", id="beside a comparison that left by name"),
        pytest.param((AZ, SEED, DENSE), ("az", "az"), "", "az-lapt-seed", id="a comparison without its expert"),
        pytest.param((AZ,), ("zh", ""), "az", "", id="beside another language"),
        pytest.param((AZ,), ("zh ru", "c1"), "", "az", id="beside another expert"),
        pytest.param((Grown("de", ("de",), "c1", "expert", "h"),), ("ru", "c0"), "de", "", id="one grown in the place of the run's own"),
    ],
)
def test_undo_gives_what_was_there_before(
    run: Path, items: tuple[Grown, ...], before: tuple[str, str], languages: str, experts: str
) -> None:
    growth = grown(run, *items, dropped=before)
    said = ask(run, languages, experts)
    assert read_growth(run) != growth and f"{languages.replace(' ', ',')}{experts} --undo" in said[-1]
    ask(run, languages, experts, undo=True)
    assert read_growth(run) == growth


def test_the_files_of_a_grown_expert_are_named_where_they_stay(run: Path) -> None:
    grown(run, AZ)
    assert f"(its files stay in {run}/grown/az)" in ask(run, "az")[-1]


@pytest.mark.parametrize(
    ("before", "experts", "words"),
    [
        (("", "az"), "az", "its languages are held by az-uk now; drop that first"),
        (("az uk", "az az-uk"), "az az-uk", "`az-uk` cannot come back: its languages are held by az now"),
    ],
)
def test_a_language_has_one_grown_expert(run: Path, before: tuple[str, str], experts: str, words: str) -> None:
    growth = grown(run, AZ, AZ_UK, dropped=before)
    with pytest.raises(GrowError, match=words):
        ask(run, experts=experts, undo=True)
    assert read_growth(run) == growth and Noted.made == []


def test_an_expert_comes_back_with_a_language_only_if_no_other_of_its_languages_is_held(run: Path) -> None:
    grown(run, AZ_UK, AZ, dropped=("uk", "az-uk"))
    with pytest.raises(GrowError, match="`az-uk` cannot come back: its languages are held by az now"):
        ask(run, "uk", undo=True)


def test_a_language_has_one_holder_where_it_was_dropped_of_an_expert_that_stays(run: Path) -> None:
    """The way out that `grow az` names where az-uk holds it: drop az there, then grow it, or bring back the az of before."""
    grown(run, AZ, AZ_UK, dropped=("az", "az"))
    ask(run, experts="az", undo=True)
    assert {name: list(text) for name, text in held_clusters(run, read_growth(run)).items() if name in ("az", "az-uk")} == {
        "az": ["az"],
        "az-uk": ["uk"],
    }
    growth = read_growth(run)
    ask(run, "az")
    assert dropped(run) == (("az",), ("az",))
    ask(run, "az", undo=True)
    assert read_growth(run) == growth


def test_what_cannot_be_made_is_not_dropped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = grown(run, AZ, dropped=("zh", ""))
    monkeypatch.setattr(Noted, "refused", "ensemble")
    for languages, undo in (("az", False), ("zh", True)):
        with pytest.raises(MegaxelmError, match="ensemble cannot be made"):
            ask(run, languages, undo=undo)
        assert read_growth(run) == growth


def test_nobody_drops_while_another_grows(run: Path) -> None:
    with RunFolder(run).lock(FOLDER), pytest.raises(StageError, match="another megaxelm works here"):
        ask(run, "de")
    assert not (run / "growth.json").exists()
