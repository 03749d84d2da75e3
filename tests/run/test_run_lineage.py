"""The lineage of a run: what it says of each expert, what it finds changed, and the history that outlives it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_training import FakeTraining, write_export

from megaxelm.cli import app
from megaxelm.console import run_guarded
from megaxelm.errors import StageError
from megaxelm.files import read_json, write_json
from megaxelm.lineage import check_lineage, lineage_tree, read_history, record_event
from megaxelm.recipe import load_recipe
from megaxelm.run import MadeFrom, RunFolder
from megaxelm.stages import Stages

NAMES = ["seed", "dense", "bg-en", "de-ru"]


@pytest.fixture
def run(indexed_run: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of seed, dense model and two experts that look trained."""
    monkeypatch.setattr("megaxelm.train.launch.train_members", FakeTraining())
    folder = RunFolder(indexed_run)
    stages(folder).train_models(None)
    return folder


def stages(run: RunFolder) -> Stages:
    return Stages(run, run.recipe(), say=lambda text: None, check_sources=False)


def entries(run: RunFolder) -> dict[str, dict[str, Any]]:
    return read_json(run.path / "lineage.json")["experts"]


def grow(run: RunFolder, name: str, donor: str, kind: str = "expert", steps: int = 2, **record: Any) -> str:
    """An expert that looks grown; returns the hash of its weights."""
    inner = RunFolder(run.path / "grown" / name)
    weights = write_export(inner.expert(name) / "export", 3.5 + len(name))
    made_from = MadeFrom({"member": {"steps": steps, "batch_sequences": 4, "sequence_length": 32}}, {"corpus": "c", "experts/seed": "s"})
    inner.close_expert(name, made_from, weights)
    path = run.path / "growth.json"
    growth = read_json(path) if path.exists() else {"grown": [], "dropped": {"languages": [], "experts": []}}
    donor_weights = stages(run).lineage()[donor]["weights"]
    row = {"name": name, "languages": [name], "donor": donor, "kind": kind, "donor_weights": donor_weights} | record
    write_json(path, growth | {"grown": [*growth["grown"], row]})
    return weights


@pytest.fixture
def lineage(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*options: str) -> tuple[int, str, str]:
        found: list[Any] = []
        code = run_guarded(lambda: found.append(app(["lineage", str(run.path), *options], standalone_mode=False)))
        said = capsys.readouterr()
        return code or found[0] or 0, said.out, said.err

    return command


def test_every_expert_knows_where_it_comes_from(run: RunFolder) -> None:
    found = entries(run)
    assert list(found) == NAMES
    assert [(item["parent"], item["kind"], item["round"]) for item in found.values()] == [
        (None, "seed", 0), ("seed", "dense", 1), ("seed", "expert", 1), ("seed", "expert", 1)
    ]  # fmt: skip
    assert [(item["steps"], item["tokens"], item["tokens_seen"]) for item in found.values()] == [
        (6, 1536, 1536), (6, 1536, 3072), (6, 768, 2304), (6, 768, 2304)
    ]  # fmt: skip
    assert found["de-ru"]["languages"] == ["de", "ru"] and found["de-ru"]["folder"] == "experts/de-ru"
    assert all(item["parent_weights"] == found["seed"]["weights"] for name, item in found.items() if name != "seed")
    assert found["seed"]["parent_weights"] is None
    assert found["seed"]["data"] == found["dense"]["data"] != found["bg-en"]["data"] != found["de-ru"]["data"], "what each was trained on"
    assert len({item["weights"] for item in found.values()}) == 4


def test_a_loaded_seed_has_seen_nothing(run: RunFolder) -> None:
    marker = run.expert("seed") / "stage.json"
    content = read_json(marker)
    write_json(marker, content | {"settings": {"seed.load": "somewhere", "export": {}}})
    seed = stages(run).lineage()["seed"]
    assert (seed["tokens"], seed["steps"], seed["data"]) == (0, 0, None)
    assert stages(run).lineage()["dense"]["tokens_seen"] == 1536


def test_an_expert_that_was_trained_under_another_recipe_keeps_what_it_was_trained_with(run: RunFolder) -> None:
    run.write_recipe(load_recipe(run.path / "recipe.yaml", ["train.steps=50", "seed.steps=6"]))
    assert stages(run).lineage()["bg-en"]["tokens"] == 768


def test_the_weights_of_the_parent_are_those_at_the_branch(run: RunFolder) -> None:
    before = entries(run)["seed"]["weights"]
    weights = write_export(run.expert("seed") / "export", 77.0)
    marker = run.expert("seed") / "stage.json"
    write_json(marker, read_json(marker) | {"weights": weights})
    stages(run).write_lineage()
    found = entries(run)
    assert found["seed"]["weights"] == weights and found["bg-en"]["parent_weights"] == before, "as it was when the expert branched"
    wrong = check_lineage(run.path, found)
    assert set(wrong) == {"dense", "bg-en", "de-ru"} and "branched from weights" in wrong["bg-en"] and "of seed" in wrong["bg-en"]
    (run.path / "lineage.json").unlink()
    assert stages(run).lineage()["bg-en"]["parent_weights"] is None, "it cannot be known any more"


def test_a_grown_expert_is_a_branch_of_its_donor(run: RunFolder) -> None:
    weights = grow(run, "az", "bg-en")
    grow(run, "sv", "az", steps=3)
    grow(run, "pl", "dense", kind="lapt")
    (run.path / "grown" / "unfinished").mkdir()
    path = run.path / "growth.json"
    growth = read_json(path)
    row = growth["grown"][0] | {"name": "unfinished"}
    write_json(path, {"grown": [*growth["grown"], row], "dropped": {"languages": ["de"], "experts": ["de-ru"]}})
    stages(run).write_lineage()
    found = entries(run)
    assert list(found) == [*NAMES, "az", "sv", "pl"]
    assert (found["az"]["kind"], found["az"]["parent"], found["az"]["round"], found["az"]["weights"]) == ("grown", "bg-en", 2, weights)
    assert (found["sv"]["round"], found["sv"]["tokens"], found["sv"]["tokens_seen"]) == (3, 384, 2304 + 256 + 384)
    assert found["pl"]["kind"] == "lapt" and found["az"]["parent_weights"] == found["bg-en"]["weights"]
    assert found["az"]["folder"] == "grown/az/experts/az"
    assert [name for name, item in found.items() if item.get("dropped")] == ["de-ru"]
    assert check_lineage(run.path, found) == {}
    write_export(run.path / "grown" / "az" / "experts" / "az" / "export", 9.0)
    assert list(check_lineage(run.path, found)) == ["az"]


def test_the_tree_is_drawn(run: RunFolder, lineage: Callable[..., tuple[int, str, str]]) -> None:
    grow(run, "az", "bg-en")
    code, said, _ = lineage()
    lines = said.splitlines()
    assert code == 0 and lines[0] == "tiny" and lines[1].startswith("└── seed  round 0; bg de en ru; 1,536 tokens; weights ")
    assert any(line.startswith("    ├── bg-en  expert, round 1; bg en; 768 tokens, 2,304 seen; weights ") for line in lines)
    assert any(line.startswith("    │   └── az  grown, round 2; az; 256 tokens, 2,560 seen; weights ") for line in lines)
    assert len(lines) == 6


def test_a_parent_that_is_gone_is_told() -> None:
    from rich.console import Console

    entry = {"kind": "expert", "round": 1, "languages": "by document", "tokens": 1, "tokens_seen": 1, "weights": "0" * 64}
    console = Console(width=200)
    with console.capture() as said:
        console.print(lineage_tree("[run]", {"b": entry | {"parent": "a"}, "a": entry | {"parent": "lost"}}))
    lines = said.get().splitlines()
    assert lines[0] == "[run]" and "its parent lost is not in this run" in lines[1] and lines[2].strip().startswith("└── b")


def test_changed_weights_are_found(run: RunFolder, lineage: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = lineage("--check")
    assert code == 0 and "4 models checked: the weights of each are those that were trained" in said
    write_export(run.expert("bg-en") / "export", 0.25)
    code, said, _ = lineage("--check")
    assert code == 1 and said.count("DIFFERS") == 1 and "DIFFERS  bg-en: its weights are" in said
    code, said, _ = lineage("--check", "--json")
    assert code == 1 and list(json.loads(said)["wrong"]) == ["bg-en"]
    assert lineage()[0] == 0, "without --check nothing is hashed"


def test_exports_that_are_gone_or_damaged_are_found(run: RunFolder) -> None:
    shutil.rmtree(run.expert("dense") / "export")
    (run.expert("bg-en") / "export" / "model.safetensors").write_bytes(b"broken")
    wrong = check_lineage(run.path, stages(run).lineage())
    assert set(wrong) == {"dense", "bg-en"} and "its export is missing" in wrong["dense"] and "model.safetensors" in wrong["bg-en"]


def test_the_history_outlives_what_is_written_anew(run: RunFolder, lineage: Callable[..., tuple[int, str, str]]) -> None:
    before = {name: item["weights"] for name, item in entries(run).items()}
    event = record_event(run.path, "grow az from bg-en", before, before | {"az": "1"})
    assert (event["new"], event["changed"], event["gone"]) == (["az"], [], [])
    event = record_event(run.path, "something else", before, {"seed": "0", "dense": before["dense"]})
    assert (event["new"], event["changed"], event["gone"]) == ([], ["seed"], ["bg-en", "de-ru"])
    (run.expert("bg-en") / "stage.json").unlink()
    stages(run).write_lineage()
    assert "bg-en" not in entries(run)
    history = read_history(run.path)
    assert [item["what"] for item in history] == ["grow az from bg-en", "something else"]
    assert history[0]["before"] == before and history[0]["after"]["az"] == "1"
    _, said, _ = lineage()
    assert "grow az from bg-en: what was there before is unchanged" in said and "something else: changed: seed" in said


def test_a_damaged_lineage_is_not_overwritten(run: RunFolder, lineage: Callable[..., tuple[int, str, str]]) -> None:
    (run.path / "lineage.json").write_text("{")
    with pytest.raises(StageError, match="lineage.json: damaged.*lose the history"):
        stages(run).write_lineage()
    code, _, errors = lineage()
    assert code == 2 and "lineage.json: damaged" in errors and "Traceback" not in errors
    assert (run.path / "lineage.json").read_text() == "{"


def test_a_lineage_of_an_earlier_version_is_read(run: RunFolder) -> None:
    found = entries(run)
    old = {name: {key: item[key] for key in ("parent", "kind", "languages", "tokens", "steps", "weights")} for name, item in found.items()}
    write_json(run.path / "lineage.json", {"experts": old})
    stages(run).write_lineage()
    assert entries(run) == found and read_history(run.path) == []


def test_a_run_of_which_nothing_is_trained_has_no_lineage(indexed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_guarded(lambda: app(["lineage", str(indexed_run)], standalone_mode=False))
    assert code == 2 and "nothing of this run is trained yet" in capsys.readouterr().err
