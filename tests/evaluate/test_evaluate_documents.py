"""`documents.npz`, `streams.npz`, further texts and further numbers of experts of the stage `evaluation`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import evaluate

from megaxelm.ensemble.folder import load_ensemble
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import mixture_logprob
from megaxelm.errors import MegaxelmError
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.streams import load_streams
from megaxelm.evaluate.texts import text_files
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages

MakeRun = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def test_documents_and_streams_hold_what_the_results_were_made_from(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    sections = {"evaluation": {"top_m": [2, 1], "max_documents": 3, "routers": ["posterior", "tfidf"]}}
    results = evaluate(run, make_recipe("language", **sections))
    documents = DocumentScores.load(run / "evaluation" / "documents.npz")
    mixtures = [f"mixture:{router}{m}" for m in ("", "@2", "@1") for router in ("posterior", "tfidf")]
    assert set(documents.nats) == {"seed", "dense", "expert:en", "expert:ja", "expert:ru", *mixtures}
    for key in (*mixtures, "seed", "dense"):
        for language, score in results["models"][key.replace(":", "-")]["languages"].items():
            nats, num_bytes = documents.nats[key][language], documents.num_bytes[language]
            assert nats.shape == (3,) and nats.dtype == np.float64 and (nats > 0).all() and num_bytes.dtype == np.int64
            assert math.fsum(nats) / math.log(2) / num_bytes.sum() == pytest.approx(score["bits_per_byte"], rel=1e-12)
            assert math.exp(math.fsum(nats) / documents.num_tokens[language].sum()) == pytest.approx(score["perplexity"], rel=1e-9)
    assert results["models"]["mixture-posterior@2"]["label"] == "posterior mixture, top 2"

    streams, ensemble = load_streams(run / "evaluation" / "streams.npz"), load_ensemble(run / "ensemble")
    assert streams.experts == ensemble.experts == ["en", "ja", "ru"]
    for language, item in streams.held_out.items():
        assert item.num_bytes == documents.num_bytes[language].tolist()
        for number, (ids, logprobs) in enumerate(zip(item.ids, streams.logprobs[language], strict=True)):
            own = -float(logprobs[["en", "ja", "ru"].index(language)].double().sum())
            assert own == pytest.approx(documents.nats[f"expert:{language}"][language][number])
            for name, m in (("posterior", 2), ("tfidf", 1), ("tfidf", None)):
                mixed = -float(mixture_logprob(logprobs, ensemble.router(name), ids, Request((), language), m).sum())
                key = f"mixture:{name}" + (f"@{m}" if m else "")
                assert mixed == pytest.approx(documents.nats[key][language][number], rel=1e-12)


def write_texts(folder: Path, texts: dict[str, list[str]]) -> str:
    folder.mkdir()
    for language, lines in texts.items():
        rows = [json.dumps({"id": "x", "lang": language, "text": text}, ensure_ascii=False) for text in lines]
        (folder / f"{language}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return f"{folder}/*.jsonl"


def test_further_texts_are_read_whole_by_every_model(
    make_run: MakeRun, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("language")
    long = "слово за словом идёт по дороге " * 4  # longer than the 48 tokens of a held-out document, and than the 64 positions
    files = write_texts(tmp_path / "laws", {"ru": [long, "закон"], "en": ["a law", "all are free"], "fi": ["laki", "vapaa"]})
    results = evaluate(run, make_recipe("language", evaluation={"texts": {"laws": files}, "routers": ["language"]}))
    assert "fi: not among the run's languages" in capsys.readouterr().out
    found = results["texts"]["laws"]
    assert [row["code"] for row in found["languages"]] == ["en", "ru"] and found["same_number_of_texts"]
    assert found["languages"][1] == {
        "code": "ru",
        "texts": 2,
        "bytes": len((long + "закон").encode()),
        "tokens": len((long + "закон").encode()),
    }
    documents = DocumentScores.load(run / "evaluation" / "texts" / "laws.npz")
    assert documents.num_bytes["ru"].tolist() == [len(long.encode()), len("закон".encode())]
    own, expert = found["models"]["own"]["languages"], found["models"]["expert:ru"]["languages"]
    assert own["ru"] == expert["ru"] == found["models"]["mixture:language"]["languages"]["ru"]
    assert expert["ru"]["bits_per_text"] == pytest.approx(documents.nats["expert:ru"]["ru"].mean() / math.log(2))
    assert expert["ru"]["bits_per_text"] == pytest.approx(expert["ru"]["bits_per_byte"] * found["languages"][1]["bytes"] / 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ru": ["x"]}, "no such file; give files <language>.jsonl"),
        ({"fi": ["laki"]}, "no file of a language of this run; it has en, ja, ru"),
        ({"ru": [" "]}, "ru.jsonl has no text"),
    ],
)
def test_texts_that_cannot_be_read_are_told(
    files: dict[str, list[str]], message: str, make_run: MakeRun, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    pattern = write_texts(tmp_path / "laws", files)
    if "no such" in message:
        pattern = str(tmp_path / "*.json")
    with pytest.raises(MegaxelmError, match=f"evaluation.texts.laws.*{message}"):
        evaluate(make_run("language"), make_recipe("language", evaluation={"texts": {"laws": [pattern]}}))


def test_two_files_of_one_language_and_other_kinds_of_files_are_told(tmp_path: Path) -> None:
    write_texts(tmp_path / "laws", {"ru": ["x"]})
    (tmp_path / "laws" / "ru.jsonl.gz").write_bytes(b"")
    with pytest.raises(MegaxelmError, match="ru.jsonl and .*ru.jsonl.gz are both of the language 'ru'"):
        text_files("laws", [f"{tmp_path}/laws/*"])
    (tmp_path / "laws" / "ru.jsonl.gz").rename(tmp_path / "laws" / "notes.txt")
    with pytest.raises(MegaxelmError, match="notes.txt: its name must be <language>.jsonl"):
        text_files("laws", [f"{tmp_path}/laws/*"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"top_m": [4]}, r"evaluation.top_m = 4 is more than clusters.k = 3"),
        ({"top_m": [0]}, "evaluation.top_m"),
        ({"texts": {"a/b": "x.jsonl"}}, "evaluation.texts: 'a/b'"),
        ({"texts": {"a": []}}, "at least one file"),
    ],
)
def test_wrong_recipe_fields_are_told(wanted: dict[str, Any], message: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(MegaxelmError, match=message):
        make_recipe("language", evaluation=wanted)


def test_fields_that_are_not_used_are_no_part_of_the_marker(indexed_run: Path) -> None:
    run = RunFolder(indexed_run)
    tree = run.recipe().model_dump(mode="json")
    stages = Stages(run, parse_recipe(tree))
    stages._fingerprints = lambda *units: {}  # type: ignore[method-assign]
    # exactly the settings of runs that were made before there were further texts and numbers of experts
    assert stages.units("evaluation")["evaluation"].settings == {
        "version": 1,
        "evaluation": {"max_documents": 5, "sequence_length": None, "routers": ["language", "tfidf", "posterior", "uniform"]},
        "sequence_length": 32,
    }
    tree["evaluation"] |= {"top_m": [1]}
    stages.recipe = parse_recipe(tree)
    assert stages.units("evaluation")["evaluation"].settings["evaluation"]["top_m"] == [1]


def test_changed_texts_make_the_evaluation_stale_and_a_moved_run_does_not_look(indexed_run: Path, tmp_path: Path) -> None:
    run = RunFolder(indexed_run)
    tree = run.recipe().model_dump(mode="json")
    tree["evaluation"]["texts"] = {"laws": write_texts(tmp_path / "laws", {"ru": ["закон"]})}

    def made_from(check_sources: bool) -> Any:
        stages = Stages(run, parse_recipe(tree), check_sources=check_sources)
        stages._fingerprints = lambda *units: {}  # type: ignore[method-assign]
        return stages.units("evaluation")["evaluation"]

    first = made_from(False)
    assert list(first.sources) == ["laws/ru.jsonl"]
    with run.making("evaluation", first):
        pass
    (tmp_path / "laws" / "ru.jsonl").write_text('{"text": "право"}\n', encoding="utf-8")
    assert made_from(False) == first and made_from(True) != first
    (tmp_path / "laws" / "ru.jsonl").unlink()
    assert made_from(False) == first


@pytest.mark.parametrize("damage", ["missing", "cut", "short"])
def test_damaged_documents_are_told(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.npz"
    sizes = {"ru": np.array([3, 4])}
    scores = DocumentScores({"mixture:a|b@2": {"ru": np.array([1.5, 2.0])}}, sizes, sizes)
    scores.save(path)
    assert DocumentScores.load(path).nats["mixture:a|b@2"]["ru"].tolist() == [1.5, 2.0]
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        scores.nats["seed"] = {"ru": np.array([1.5])}
        scores.save(path)
    with pytest.raises(MegaxelmError, match=r"documents.npz: .*megaxelm run RECIPE --from evaluation"):
        DocumentScores.load(path)
