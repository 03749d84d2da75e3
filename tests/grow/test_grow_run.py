"""Growing in a trained run: what the child is made from, who is asked for what, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from growing import NEW_WORDS, drop_in, grow_in

from megaxelm.errors import CorpusError, GrowError, MegaxelmError, RecipeError, StageError
from megaxelm.files import read_json
from megaxelm.grow.make import GrowOptions
from megaxelm.growth import Growth, read_growth, write_growth
from megaxelm.model.hub import weights_hash
from megaxelm.run import RunFolder
from megaxelm.stages import Stages


def report_of(run: Path, name: str) -> dict[str, Any]:
    return read_json(run / "grown" / name / "growth_report.json")


def exports(run: Path) -> dict[str, str]:
    return {path.parent.name: weights_hash(path) for path in sorted(run.glob("experts/*/export"))}


def test_a_child_is_a_run_of_its_own_that_branches_from_the_donor(grown_run: Path) -> None:
    child = RunFolder(grown_run / "grown" / "az")
    recipe = child.recipe()
    assert list(recipe.clusters.mapping) == ["az"] and recipe.experts.dense is False
    assert recipe.corpus.languages == recipe.clusters.mapping["az"] == ["az", "de", "ru"]
    assert (recipe.train.steps, recipe.train.batch_sequences) == (6, 4)  # those of one of the run's two experts
    assert weights_hash(child.expert("seed") / "export") == weights_hash(grown_run / "experts" / "de-ru" / "export")
    assert (child.expert("az") / "export" / "config.json").is_file()
    assert (child.path / "corpus" / "valid" / "az.jsonl").is_file() and (child.path / "index" / "az" / "az.idx").is_file()
    assert Stages(child, recipe, check_sources=False).is_fresh("experts")


def test_replay_goes_by_the_tokens_of_the_donors_languages(grown_run: Path) -> None:
    weights = RunFolder(grown_run / "grown" / "az").recipe().train.language_weights
    counts = read_json(grown_run / "index" / "manifest.json")["clusters"]["de-ru"]
    assert weights["az"] == pytest.approx(0.75)
    tokens = read_json(grown_run / "grown" / "az" / "index" / "manifest.json")["clusters"]["az"]["az"]["tokens"]
    assert report_of(grown_run, "az")["tokens"]["az"] == pytest.approx(tokens, rel=0.2)
    assert weights["de"] + weights["ru"] == pytest.approx(0.25)
    assert weights["de"] / weights["ru"] == pytest.approx(counts["de"]["tokens"] / counts["ru"]["tokens"])


def test_comparisons_read_the_same_text_in_the_same_shares_from_other_parents(grown_run: Path) -> None:
    grown = {item.name: item for item in read_growth(grown_run).grown}
    assert {name: (item.kind, item.donor) for name, item in grown.items()} == {
        "az": ("expert", "de-ru"),
        "az-lapt-dense": ("lapt", "dense"),
        "az-lapt-seed": ("lapt", "seed"),
    }
    recipes = {name: RunFolder(grown_run / "grown" / name).recipe() for name in grown}
    assert len({json.dumps([r.train.model_dump(), r.corpus.model_dump()]) for r in recipes.values()}) == 1
    for suffix in ("bin", "idx"):
        text = {
            name: [(grown_run / "grown" / name / "index" / name / f"{code}.{suffix}").read_bytes() for code in ("az", "de")]
            for name in grown
        }
        assert text["az"] == text["az-lapt-dense"] == text["az-lapt-seed"]
    for name, item in grown.items():
        assert item.donor_weights == weights_hash(grown_run / "experts" / item.donor / "export")
        assert weights_hash(grown_run / "grown" / name / "experts" / "seed" / "export") == item.donor_weights


def test_no_old_model_is_touched_and_the_proof_is_kept(_trained_run: Path, grown_run: Path) -> None:
    assert exports(grown_run) == exports(_trained_run)
    event = read_json(grown_run / "lineage.json")["history"][-1]
    assert event["before"] == exports(_trained_run)
    assert event["new"] == ["az", "az-lapt-dense", "az-lapt-seed"] and not event["changed"]
    assert event["after"]["az"] == weights_hash(grown_run / "grown" / "az" / "experts" / "az" / "export")


def test_a_model_that_changes_meanwhile_is_told(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megaxelm.train.launch as launch

    train = launch.train_members

    def meddle(run: RunFolder, *arguments: Any) -> None:
        train(run, *arguments)
        shutil.copy(trained_run / "experts" / "seed" / "export" / "model.safetensors", trained_run / "experts" / "bg-en" / "export")

    monkeypatch.setattr(launch, "train_members", meddle)
    with pytest.raises(GrowError, match="the weights of bg-en are not what they were"):
        grow_in(trained_run, "az")


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_other_settings_redo_that_child_alone(grown_run: Path) -> None:
    grow_in(grown_run, "uk")
    times = {path: path.stat().st_mtime_ns for path in grown_run.rglob("*") if path.is_file() and path.parent.name != ".locks"}
    made, said = grow_in(grown_run, "az", lapt=True)
    assert not made and "az: fresh" in said
    after = {path: path.stat().st_mtime_ns for path in times if path.name != "growth_report.json"}
    # The stored recipes are written whenever a run is made, the measurements whenever they are told.
    changed = {path.relative_to(grown_run).as_posix() for path in after if after[path] != times[path]} - {"recipe.yaml"}
    assert {path for path in changed if not path.endswith("sample/recipe.yaml")} == set()

    before = {name: weights_hash(grown_run / "grown" / name / "experts" / name / "export") for name in ("az", "uk", "az-lapt-seed")}
    made, _ = grow_in(grown_run, "az", steps=3)
    now = {name: weights_hash(grown_run / "grown" / name / "experts" / name / "export") for name in before}
    assert made and now["az"] != before["az"] and now["uk"] == before["uk"] and now["az-lapt-seed"] == before["az-lapt-seed"]
    assert (grown_run / "grown" / "az" / "replaced" / "az-1").is_dir()
    assert read_growth(grown_run).names == ["az", "az-lapt-dense", "az-lapt-seed", "uk"]


@pytest.mark.slow
def test_an_expert_that_came_later_does_not_change_the_donor(grown_run: Path) -> None:
    grow_in(grown_run, "uk", donor="az")
    report = grown_run / "grown" / "az" / "growth_report.json"
    assert report_of(grown_run, "az")["candidates"] == ["bg-en", "de-ru"]
    made, _ = grow_in(grown_run, "az", lapt=True)
    assert not made and report_of(grown_run, "az")["candidates"] == ["bg-en", "de-ru"]
    report.unlink()
    assert not grow_in(grown_run, "az", lapt=True)[0]
    assert report_of(grown_run, "az")["candidates"] == ["bg-en", "de-ru"]


@pytest.mark.slow
def test_a_grown_expert_can_be_the_donor_and_its_text_is_replayed(grown_run: Path) -> None:
    grow_in(grown_run, "uk", donor="az")
    child = RunFolder(grown_run / "grown" / "uk")
    assert weights_hash(child.expert("seed") / "export") == weights_hash(grown_run / "grown" / "az" / "experts" / "az" / "export")
    assert set(child.recipe().train.language_weights) == {"uk", "az", "de", "ru"}
    assert report_of(grown_run, "uk")["donor"]["how"] == "by hand"
    seeds = [RunFolder(path).recipe().train.seed for path in (grown_run, grown_run / "grown" / "az", child.path)]
    assert len(set(seeds)) == 3  # nobody reads a language in the order in which its donor did
    with pytest.raises(GrowError, match="it branches from `az` itself"):
        grow_in(grown_run, "az", donor="uk")


def test_a_moved_run_has_nothing_to_do(_grown_run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(_grown_run, tmp_path / "elsewhere"))
    away = _grown_run.rename(_grown_run.with_name("away"))  # the place that the recipes of the children name
    try:
        folder = RunFolder(moved)
        assert Stages(folder, folder.recipe(), check_sources=False).is_fresh("evaluation")
        made, said = grow_in(moved, "az", lapt=True)
        assert not made and [line for line in said if "fresh" in line][1:4] == ["az: fresh", "az-lapt-dense: fresh", "az-lapt-seed: fresh"]
    finally:
        away.rename(_grown_run)


def test_a_donor_that_was_trained_again_makes_the_child_stale(grown_run: Path) -> None:
    export = grown_run / "experts" / "de-ru" / "export"
    shutil.copy(grown_run / "experts" / "bg-en" / "export" / "model.safetensors", export)
    marker = grown_run / "experts" / "de-ru" / "stage.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"weights": weights_hash(export)}))
    made, said = grow_in(grown_run, "az", donor="de-ru")
    assert made and any("az | seed" in line and "making" in line for line in said)


def test_the_same_command_finds_the_same_donor_although_it_was_dropped(grown_run: Path) -> None:
    drop_in(grown_run, "de ru")
    assert read_growth(grown_run).dropped_experts == ("de-ru",)
    made, said = grow_in(grown_run, "az", lapt=True)
    assert not made and "az: fresh" in said and report_of(grown_run, "az")["donor"]["name"] == "de-ru"


def test_bits_are_measured_again_where_a_model_or_the_sample_is_another(grown_run: Path, tmp_path: Path) -> None:
    def measured(**options: Any) -> bool:
        return any("models read a sample of az" in line for line in grow_in(grown_run, "az", dry_run=True, **options)[1])

    assert not measured()
    export, marker = (grown_run / "experts" / "bg-en" / name for name in ("export", "stage.json"))
    shutil.copy(grown_run / "experts" / "de-ru" / "export" / "model.safetensors", export)
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"weights": weights_hash(export)}))
    before = report_of(grown_run, "az")["bits_per_byte"]
    assert measured() and not measured()
    bits = report_of(grown_run, "az")["bits_per_byte"]
    assert bits["bg-en"] == bits["de-ru"] == before["de-ru"] != before["bg-en"]
    lines = (Path(trained_new(grown_run)) / "az.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    assert measured(corpus=[f"{tmp_path}/some.jsonl"])


def test_a_dry_run_binds_nobody_and_no_rule_chooses_who_was_dropped(trained_run: Path) -> None:
    def candidates(kept: Growth) -> list[str]:
        write_growth(trained_run, kept)
        grow_in(trained_run, "az", dry_run=True)
        found: list[str] = report_of(trained_run, "az")["candidates"]
        return found

    assert candidates(Growth((), ("de", "ru"), ("de-ru",))) == ["bg-en"]
    assert candidates(Growth()) == ["bg-en", "de-ru"]
    report = trained_run / "grown" / "az" / "growth_report.json"
    report.write_text(json.dumps(read_json(report) | {"dry_run": False, "candidates": ["de-ru"]}))
    assert candidates(Growth()) == ["de-ru"]  # what was stopped goes on with those it had
    report.write_text(json.dumps(read_json(report) | {"dry_run": False, "candidates": ["bg-en", "de-ru"]}))
    assert candidates(Growth((), ("de", "ru"), ("de-ru",))) == ["bg-en"]


def test_a_baseline_that_predicts_the_text_better_than_the_donor_is_advised(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = {"bg-en": 2.0, "de-ru": 2.0, "dense": 1.5, "seed": 1.0}
    monkeypatch.setattr("megaxelm.grow.study.sample_bits", lambda *given: {name: {"az": value} for name, value in bits.items()})
    monkeypatch.setattr("megaxelm.grow.study.space_notes", lambda *given: [])
    grow_in(trained_run, "az", dry_run=True)
    assert report_of(trained_run, "az")["notes"] == [
        "seed and dense predict this text better than the donor de-ru: --donor seed branches from there"
    ]
    shutil.rmtree(trained_run / "grown")
    bits |= {"dense": 2.0, "seed": 2.5}
    grow_in(trained_run, "az", dry_run=True)
    assert report_of(trained_run, "az")["notes"] == []


def test_a_dry_run_measures_and_trains_nothing(trained_run: Path) -> None:
    made, said = grow_in(trained_run, "az", "uk", dry_run=True, lapt=True)
    assert not made and "dry run" in said[-1]
    assert {path.name for path in (trained_run / "grown").iterdir()} == {"az", "uk"}
    for name in ("az", "uk"):
        assert {path.name for path in (trained_run / "grown" / name).iterdir()} == {"sample", "growth_report.json"}
    assert not (trained_run / "growth.json").exists()
    report = report_of(trained_run, "az")
    assert report["typology"]["de-ru"] < report["typology"]["bg-en"] and report["donor"] == {
        "name": "de-ru",
        "how": "typology",
        "why": report["donor"]["why"],
    }
    assert set(report["bits_per_byte"]) == {"bg-en", "de-ru", "dense", "seed"}
    assert report["training"]["tokens"] == 6 * 4 * 32
    assert report["training"]["compared_with"] == ["az-lapt-dense", "az-lapt-seed"]
    assert report["tokenizer"]["new"]["az"]["tokens_per_word"] > report["tokenizer"]["known"]["de"]["tokens_per_word"]
    with pytest.raises(RecipeError, match="train.lr"):
        grow_in(trained_run, "az", dry_run=True, overrides=["train.lr=-1"])


@pytest.mark.slow
def test_one_expert_for_several_languages(trained_run: Path) -> None:
    grow_in(trained_run, "az", "uk", together=True, replay=0.5)
    (entry,) = read_growth(trained_run).grown
    assert (entry.name, entry.languages) == ("az-uk", ("az", "uk"))
    weights = RunFolder(trained_run / "grown" / "az-uk").recipe().train.language_weights
    assert weights["az"] + weights["uk"] == pytest.approx(0.5)
    tokens = read_json(trained_run / "grown" / "az-uk" / "index" / "manifest.json")["clusters"]["az-uk"]
    assert weights["az"] / weights["uk"] == pytest.approx(tokens["az"]["tokens"] / tokens["uk"]["tokens"], rel=0.2)
    with pytest.raises(GrowError, match="uk has an expert already, `az-uk`"):
        grow_in(trained_run, "uk")


@pytest.mark.slow
def test_a_language_that_typology_does_not_know_is_judged_by_bits(trained_run: Path) -> None:
    grow_in(trained_run, "xx")
    report = report_of(trained_run, "xx")
    assert report["typology"] == {} and report["donor"]["how"] == "bits"
    assert any("no typological features of xx" in note for note in report["notes"])
    experts = {name: report["bits_per_byte"][name]["xx"] for name in ("bg-en", "de-ru")}
    assert report["donor"]["name"] == min(experts, key=lambda name: experts[name])
    with pytest.raises(GrowError, match="--donor typology: no typological distance"):
        grow_in(trained_run, "xx", donor="typology")


def test_text_from_the_command_line_beside_the_runs_own(trained_run: Path, tmp_path: Path) -> None:
    text = "\n".join(f"{' '.join(NEW_WORDS['xx'][number % 4 :])} {number}" for number in range(40))
    for number, line in enumerate(text.splitlines()):
        path = tmp_path / "texts" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(line)
    grow_in(trained_run, "sw", corpus=[f"sw={tmp_path}/texts/*.txt"])
    recipe = RunFolder(trained_run / "grown" / "sw").recipe()
    assert len(recipe.corpus.train) == 3 and recipe.corpus.train[0].language == "sw"  # type: ignore[union-attr]
    counts = read_json(trained_run / "grown" / "sw" / "corpus" / "manifest.json")["languages"]
    own = read_json(trained_run / "corpus" / "manifest.json")["languages"]
    assert counts["sw"]["train_documents"] + counts["sw"]["held_out_documents"] == 40
    assert all(counts[code] == own[code] for code in counts if code != "sw")  # the same text is held out again


@pytest.mark.slow
def test_the_text_of_a_grown_donor_is_replayed_from_where_it_was_read(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{' '.join(NEW_WORDS['xx'][number % 4 :])} {number}")
    grow_in(trained_run, "sw", corpus=[f"sw={tmp_path}/texts/*.txt"])
    grow_in(trained_run, "az", donor="sw")
    counts = read_json(trained_run / "grown" / "az" / "corpus" / "manifest.json")["languages"]
    assert counts["sw"] == read_json(trained_run / "grown" / "sw" / "corpus" / "manifest.json")["languages"]["sw"]


def test_without_replay_only_the_given_text_is_read(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "az.jsonl").write_text((Path(trained_new(trained_run)) / "az.jsonl").read_text())
    grow_in(trained_run, "az", corpus=[f"{tmp_path}/az.jsonl"], replay=0.0)
    recipe = RunFolder(trained_run / "grown" / "az").recipe()
    assert recipe.train.language_weights == {"az": 1.0} and len(recipe.corpus.train) == 1


def trained_new(run: Path) -> str:
    return RunFolder(run).recipe().corpus.train[1].files[0].removesuffix("/*.jsonl")  # type: ignore[union-attr]


MISTAKES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("name at least one language", (), {}),
    ("az given more than once", ("az", "az"), {}),
    ("--languages", ("../az",), {}),
    ("ru has an expert already, `de-ru`", ("ru",), {}),
    ("no text to grow from.*languages that occur", ("sv",), {}),
    ("not a language code of URIEL", ("qq",), {}),
    ("choose auto, bits, typology, or one of bg-en, de-ru, dense, seed", ("az",), {"donor": "pl"}),
    ("at least 0 and below 1", ("az",), {"replay": 1.0}),
    ("at least 1", ("az",), {"steps": 0}),
    ("holds its text out by hash", ("az",), {"valid": ["x.jsonl"]}),
    ("does not exist", ("az",), {"corpus": ["/nowhere/x.jsonl"]}),
    ("`clusters.k` of a grown expert is set by", ("az",), {"overrides": ["clusters.k=2"]}),
    ("use --steps", ("az",), {"overrides": ["train.steps=2"]}),
    ("train.lr", ("az",), {"overrides": ["train.lr=-1"]}),
]


@pytest.mark.parametrize(("words", "languages", "options"), MISTAKES, ids=[words[:30] for words, _, _ in MISTAKES])
def test_mistakes_are_told_before_anything_is_trained(
    trained_run: Path, words: str, languages: tuple[str, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(MegaxelmError, match=words):
        grow_in(trained_run, *languages, **options)
    assert not (trained_run / "growth.json").exists()
    assert not list(trained_run.glob("grown/*/experts")) and not list(trained_run.glob("grown/*/corpus"))
    if not options.get("overrides"):
        assert not list(trained_run.glob("grown/*"))


def test_a_child_that_is_there_outlives_a_mistake(grown_run: Path) -> None:
    with pytest.raises(GrowError, match="az: no text to grow from"):
        grow_in(grown_run, "az", corpus=["/nowhere/x.jsonl"])
    assert (grown_run / "grown" / "az" / "experts" / "az" / "export" / "config.json").is_file()


def test_a_file_that_the_run_reads_already_is_not_taken_twice(trained_run: Path) -> None:
    with pytest.raises(GrowError, match="az.jsonl is a source of the run already"):
        grow_in(trained_run, "az", corpus=[f"{trained_new(trained_run)}/az.jsonl"])


def test_text_of_the_run_that_is_gone_is_needed_for_replay_alone(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megaxelm.corpus.inputs as inputs

    shutil.copy(f"{trained_new(trained_run)}/az.jsonl", tmp_path / "az.jsonl")
    there = inputs.list_inputs

    def gone(sources: Any) -> Any:
        if any("/corpus/*.jsonl" in source.files[0] for source in sources):
            raise CorpusError("corpus source `corpus/*.jsonl` matches no file")
        return there(sources)

    monkeypatch.setattr(inputs, "list_inputs", gone)
    with pytest.raises(GrowError, match="the text of the run is needed again.*matches no file.*--replay 0"):
        grow_in(trained_run, "az", corpus=[f"{tmp_path}/az.jsonl"])
    assert not (trained_run / "growth.json").exists()
    assert grow_in(trained_run, "az", corpus=[f"{tmp_path}/az.jsonl"], replay=0.0)[0]


def test_a_run_that_is_not_trained_or_has_no_dense_model(trained_run: Path) -> None:
    recipe = RunFolder(trained_run).recipe()
    shutil.rmtree(trained_run / "experts" / "bg-en")
    with pytest.raises(StageError, match="experts/bg-en is missing"):
        grow_in(trained_run, "az")
    from megaxelm.grow.make import grow

    lean = recipe.model_copy(update={"experts": recipe.experts.model_copy(update={"dense": False})})
    with pytest.raises(GrowError, match="this run has no dense model"):
        grow(RunFolder(trained_run), lean, GrowOptions(["az"], lapt=True))


@pytest.mark.slow
def test_a_killed_growth_goes_on_where_it_was(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megaxelm.train.launch as launch

    train = launch.train_members

    def die(run: RunFolder, recipe: Any, members: list[Any], options: object = None) -> None:
        if members[0].name == "uk":
            raise KeyboardInterrupt
        train(run, recipe, members)

    monkeypatch.setattr(launch, "train_members", die)
    with pytest.raises(KeyboardInterrupt):
        grow_in(trained_run, "az", "uk")
    assert read_growth(trained_run).names == ["az"]
    monkeypatch.setattr(launch, "train_members", train)
    made, said = grow_in(trained_run, "az", "uk")
    assert made and "az: fresh" in said and read_growth(trained_run).names == ["az", "uk"]
    assert report_of(trained_run, "uk")["candidates"] == ["bg-en", "de-ru"]


@pytest.mark.slow
def test_a_language_that_was_dropped_can_be_grown_again_in_another_group(grown_run: Path) -> None:
    with pytest.raises(GrowError, match="az has an expert already"):
        grow_in(grown_run, "az", "uk", together=True)
    drop_in(grown_run, "az")
    with pytest.raises(GrowError, match="was dropped and is still there.*--undo"):
        grow_in(grown_run, "az")
    grow_in(grown_run, "az", "uk", together=True)
    growth = read_growth(grown_run)
    assert [item.name for item in growth.experts] == ["az-uk"]
    assert growth.dropped_languages == () and growth.dropped_experts == ("az",)
    with pytest.raises(GrowError, match="held by az-uk"):
        drop_in(grown_run, experts="az", undo=True)
