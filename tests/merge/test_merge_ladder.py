"""The ladder: every rung on the same documents, what it costs, and the tables."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_models import write_adapter, write_base
from safetensors.torch import load_file

from megaxelm.console import run_guarded
from megaxelm.errors import RoutingError, StageError
from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.rungs import choose_rungs, open_rung, rung_folders
from megaxelm.merge.ladder import LadderOptions, climb, expert_parameters
from megaxelm.merge.ladder_table import print_ladder, short_number
from megaxelm.merge.make import MergeOptions, Merging
from megaxelm.merge.material import open_material
from megaxelm.merge.speed import median_speed, some_documents
from megaxelm.model.hub import load_pretrained, open_pretrained
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder


def test_the_ladder_compares_all_rungs_on_the_same_documents(merging: Callable[[], Merging], run: RunFolder, recipe: Recipe) -> None:
    first, second = open_material(run).names
    made = merging()
    made.make(MergeOptions("average", weights=f"{first}=1", name="only-first"))
    made.make(MergeOptions("moe", top_k=1, sample_tokens=600))
    found = climb(run, recipe, LadderOptions(routers=["language", "posterior"], top_ms=[None, 1], max_documents=3))
    models = found["models"]
    expected = ["seed", "dense", "own", "mixture:language", "mixture:posterior", "mixture:posterior@1", "merged:moe", "merged:only-first"]
    assert list(models) == expected
    assert json.loads((run.path / "merged" / "ladder.json").read_text()) == json.loads(json.dumps(found))
    own = {row["code"]: row["own"] for row in found["languages"]}
    assert set(own.values()) == {first, second}

    # One model by hand, from full logits.
    tokenizer = open_rung(run.path, "seed").tokenizer
    decoder = load_pretrained(run.expert("seed") / "export")
    nats, num_bytes, documents = 0.0, 0, (run.folder("corpus") / "valid" / "de.jsonl").read_text().splitlines()[:3]
    for line in documents:
        ids, size = tokenizer.cut(json.loads(line)["text"], 32)
        tokens = torch.tensor([tokenizer.start_id, *ids[:-1]])
        with torch.no_grad():
            logits = decoder.logits(decoder(tokens, torch.arange(len(ids)), torch.tensor([0, len(ids)]))).double()
        nats -= float(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())
        num_bytes += size
    assert models["seed"]["bits_per_byte"]["de"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)

    of_one, of_all = (models[key]["mean_bits_per_byte"] for key in ("mixture:posterior@1", "mixture:posterior"))
    assert abs(of_one - of_all) > 1e-4, "the expert that leads alone"
    for code, name in own.items():
        assert models["own"]["bits_per_byte"][code] == pytest.approx(models["mixture:language"]["bits_per_byte"][code], rel=1e-6)
        if name == first:
            assert models["merged:only-first"]["bits_per_byte"][code] == pytest.approx(models["own"]["bits_per_byte"][code], rel=1e-6)
    for model in models.values():
        bits = model["bits_per_byte"]
        assert model["mean_bits_per_byte"] == pytest.approx(sum(bits.values()) / 4)
        assert model["worst_bits_per_byte"] == max(bits.values()) == bits[model["worst_language"]]
        assert model["tokens_per_second"] > 0

    scores = DocumentScores.load(run.path / "merged" / "ladder-documents.npz")
    assert set(scores.nats) == set(models) and scores.languages == list(own)
    total = scores.nats["merged:moe"]["ru"].sum() / math.log(2) / scores.num_bytes["ru"].sum()
    assert total == pytest.approx(models["merged:moe"]["bits_per_byte"]["ru"])

    one = models["seed"]["parameters"]
    costs = {key: (model["parameters"], model["active_parameters"]) for key, model in models.items()}
    assert costs["dense"] == costs["merged:only-first"] == (one, one)
    assert costs["mixture:posterior"] == (2 * one, 2 * one)
    assert costs["own"] == costs["mixture:language"] == costs["mixture:posterior@1"] == (2 * one, one)
    assert one < costs["merged:moe"][0] < 2 * one and costs["merged:moe"][1] == one + 2 * 2 * 32  # and the routers


def test_experts_that_are_deltas_hold_their_base_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    whole = open_pretrained(base)
    of_one, of_another = (open_pretrained(write_adapter(tmp_path / name, base, number)) for number, name in enumerate("ab"))
    files = (base / "model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    size, delta = (sum(tensor.numel() for tensor in load_file(path).values()) for path in files)
    assert expert_parameters([whole, whole]) == (2 * size, size)
    assert expert_parameters([of_one, of_another]) == (size + 2 * delta, size + delta)
    assert expert_parameters([of_one, of_another, whole]) == (2 * size + 2 * delta, size + delta)  # a dense model as fallback


def test_the_ladder_without_speed_and_what_it_refuses(run: RunFolder, recipe: Recipe) -> None:
    found = climb(run, recipe, LadderOptions(routers=["uniform"], max_documents=1, speed=False))
    assert [model["tokens_per_second"] for model in found["models"].values()] == [None] * 4
    with pytest.raises(RoutingError, match="--top-m 3: choose 1 to 2"):
        climb(run, recipe, LadderOptions(top_ms=[3]))


def test_speed_is_the_median_and_the_first_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds, calls = [0.0], iter([100.0, 1.0, 9.0, 2.0]), []

    def score() -> None:
        calls.append(1)
        clock[0] += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert median_speed(score, 10, repeats=3) == 5.0 and len(calls) == 4
    documents = [("de", [1] * 10)] * 40
    assert len(some_documents(documents, 100)) == 10 and some_documents(documents, 10_000) == documents


def test_the_table_shows_costs_and_every_language_and_stars_the_best() -> None:
    codes = [f"l{number}" for number in range(30)]
    models = {}
    for number, key in enumerate(("seed", "merged:moe")):
        bits = {code: 1.0 + 0.1 * number + 0.001 * place for place, code in enumerate(codes)}
        models[key] = {
            "label": key,
            "bits_per_byte": bits,
            "mean_bits_per_byte": 1.5 - number,
            "worst_bits_per_byte": max(bits.values()),
            "worst_language": "l29",
            "parameters": 1_234_567,
            "active_parameters": 2_000,
            "tokens_per_second": None if number else 12345.6,
        }
    text = io.StringIO()
    print_ladder({"languages": [{"code": code} for code in codes], "models": models}, text, width=100)
    lines = text.getvalue().splitlines()
    seed, moe = (next(line for line in lines if line.startswith(f" {key}")) for key in models)
    assert "1.500 " in seed and "0.500*" in moe and "12,346" in seed and "1.23M" in seed and "2k" in moe and " - " in f"{moe} "
    assert all(any(code in line.split() for line in lines) for code in codes) and max(map(len, lines)) <= 100
    assert sum(line.startswith(" seed") for line in lines) >= 4
    assert [short_number(value) for value in (1.7e9, 560e6, 12, 999)] == ["1.7B", "560M", "12", "999"]


def test_rungs_are_named_and_opened_as_ensembles_of_one(merging: Callable[[], Merging], run: RunFolder) -> None:
    merging().make(MergeOptions("average"))
    assert list(rung_folders(run.path)) == ["seed", "dense", "average-uniform"]
    assert choose_rungs(run.path, "all") == ["mixture", "seed", "dense", "average-uniform"]
    assert choose_rungs(run.path, "seed, average-uniform") == ["seed", "average-uniform"]
    for wanted in ("moe", ","):
        with pytest.raises(StageError, match="this run has mixture, seed, dense, average-uniform"):
            choose_rungs(run.path, wanted)
    assert len(open_rung(run.path, "mixture").experts) == 2
    alone = open_rung(run.path, "average-uniform")
    assert alone.experts == ["average-uniform"] and alone.fallback is None
    expected = load_pretrained(run.path / "merged" / "average-uniform")
    assert torch.equal(alone.decoder(0).embed.weight, expected.embed.weight)


def test_tasks_of_several_rungs_stand_in_one_table(merging: Callable[[], Merging], run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from megaxelm.evaluate import harness

    asked = []

    def run_tasks(ensemble: object, tasks: object, **options: object) -> dict[str, object]:
        asked.append((ensemble.experts, options))  # type: ignore[attr-defined]
        number = len(asked)
        return {"results": {"copa": {"alias": "copa", "acc,none": number / 4, "acc_stderr,none": 0.125, "f1,strict": 0.5, "n,none": "N/A"}}}

    monkeypatch.setattr(harness, "run_tasks", run_tasks)
    found = harness.run_rungs(run.path, ["mixture", "seed"], ["copa"], router="uniform", top_m=None, combine=None, limit=3.0)
    assert asked[0][1] == {"router": "uniform", "top_m": None, "combine": None, "limit": 3.0} and len(asked[0][0]) == 2
    assert asked[1] == (["seed"], {"limit": 3.0})
    lines = harness.rungs_table(found).splitlines()
    assert any("copa acc" in line and "copa f1 (strict)" in line for line in lines)
    assert [line.split() for line in lines if "±" in line] == [
        ["mixture", "0.2500", "±", "0.1250", "0.5000"],
        ["seed", "0.5000", "±", "0.1250", "0.5000"],
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("merge", "--into", "average", "--top-k", "2"), "--top-k: belongs to --into moe, not to average"),
        (("merge", "--into", "moe", "--steps", "2"), "--steps: belongs to --into distilled, not to moe"),
        (("merge", "--into", "moe", "--train", "all"), "--train: belongs to --router-steps"),
        (("merge", "--into", "moe", "--router", "posterior"), "--router: belongs to --weights router"),
        (("merge", "--into", "average", "--set", "train.lr=1"), "nothing is trained here"),
        (("ladder", "--top-m", "all,two"), "--top-m all,two: numbers of experts"),
        (("evaluate", "--rung", "all"), "--rung: belongs to --tasks"),
    ],
)
def test_options_that_do_not_belong_are_refused(
    arguments: tuple[str, ...], text: str, run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaxelm.cli import app
    from megaxelm.stages import Stages

    monkeypatch.setattr(Stages, "make_one", lambda self, stage: False)
    verb, *rest = arguments
    code = run_guarded(lambda: app([verb, str(run.path), *rest], standalone_mode=False))
    assert code == 2 and text in capsys.readouterr().err


def test_the_commands_make_and_show(run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm.cli import app
    from megaxelm.stages import Stages

    monkeypatch.setattr(Stages, "make_one", lambda self, stage: False)
    recipe = (run.path / "recipe.yaml").read_bytes()
    for arguments in (
        ["merge", "--into", "average", "--weights", "language:ru"],
        ["merge", "--into", "moe", "--top-k", "1", "--sample-tokens", "500", "--router-scale", "5"],
        ["ladder", "--routers", "language", "--max-documents", "2", "--no-speed"],
    ):
        verb, *rest = arguments
        assert run_guarded(lambda verb=verb, rest=rest: app([verb, str(run.path), *rest], standalone_mode=False)) in (0, None)  # type: ignore[misc]
    out = capsys.readouterr().out
    assert "average-language-ru" in out and "language mixture" in out and "moe" in out
    assert (run.path / "recipe.yaml").read_bytes() == recipe
    assert np.isfinite(json.loads((run.path / "merged" / "ladder.json").read_text())["models"]["merged:moe"]["mean_bits_per_byte"])
