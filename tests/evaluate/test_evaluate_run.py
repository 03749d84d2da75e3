"""The stages `ensemble` and `evaluation` on a small run: figures against transformers' own models, and errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaxelm.ensemble.centres import mean_centres
from megaxelm.ensemble.folder import load_ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.stage import build_ensemble, language_experts
from megaxelm.errors import MegaxelmError
from megaxelm.evaluate.documents import document_nats
from megaxelm.evaluate.perplexity import read_held_out
from megaxelm.evaluate.stage import evaluate_run
from megaxelm.evaluate.subjects import own_experts
from megaxelm.recipe import Recipe

MakeRun = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def evaluate(run: Path, recipe: Recipe) -> dict[str, Any]:
    build_ensemble(recipe, run, run / "ensemble")
    out = run / "evaluation"
    out.mkdir()
    evaluate_run(recipe, run, out)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def texts_of(run: Path, language: str) -> list[str]:
    lines = (run / "corpus" / "valid" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def target_logprobs(run: Path, name: str, text: str) -> torch.Tensor:
    """Log-probabilities of the bytes of a text by transformers' own class in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "experts" / name / "export", dtype=torch.float64).eval()
    ids = torch.tensor([1, *(byte + 4 for byte in text.encode())])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def test_bits_per_byte_agree_with_transformers(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    results = evaluate(run, make_recipe("language"))
    for language in ("en", "ja", "ru"):
        texts = texts_of(run, language)
        num_bytes = sum(len(text.encode()) for text in texts)
        by_model = {
            name: torch.stack([target_logprobs(run, name, text).sum() for text in texts]) for name in ("seed", "dense", "en", "ja", "ru")
        }
        bits = {name: float(-value.sum()) / math.log(2) / num_bytes for name, value in by_model.items()}
        # Equal priors and the cumulative posterior: a document's probability is the mean of those of the experts.
        experts = torch.stack([by_model[name] for name in ("en", "ja", "ru")])
        posterior = -float((experts.logsumexp(0) - math.log(3)).sum()) / math.log(2) / num_bytes
        expected = {
            "seed": bits["seed"],
            "dense": bits["dense"],
            "own": bits[language],
            "mixture-language": bits[language],
            "mixture-posterior": posterior,
            "worst": max(bits[name] for name in ("en", "ja", "ru")),
        }
        for key, value in expected.items():
            found = results["models"][key]["languages"][language]
            assert found["bits_per_byte"] == pytest.approx(value, rel=1e-5), (key, language)
            # One byte is one token here.
            assert found["perplexity"] == pytest.approx(2**value, rel=1e-4)
        row = next(row for row in results["languages"] if row["code"] == language)
        assert row == {"code": language, "own": language, "documents": 4, "bytes": num_bytes, "tokens": num_bytes}


def test_summary_follows_from_the_rows(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    results = evaluate(make_run("language"), make_recipe("language"))
    assert list(results["models"]) == [
        "seed", "dense", "own", "mixture-language", "mixture-tfidf", "mixture-posterior", "mixture-uniform", "worst",
    ]  # fmt: skip
    for model in results["models"].values():
        values = {code: score["bits_per_byte"] for code, score in model["languages"].items()}
        assert model["mean_bits_per_byte"] == pytest.approx(sum(values.values()) / 3)
        assert model["worst_bits_per_byte"] == max(values.values()) == values[model["worst_language"]]
    own, dense = (results["models"][key]["languages"] for key in ("own", "dense"))
    difference = {code: own[code]["bits_per_byte"] - dense[code]["bits_per_byte"] for code in own}
    assert results["verdict"]["beaten"] == [code for code, value in difference.items() if value < 0]
    assert results["verdict"]["not_beaten"] == pytest.approx({code: value for code, value in difference.items() if value >= 0})
    assert results["experts"]["ja"]["ja"] == own["ja"]["bits_per_byte"]
    assert results["account"]["equal"] is True
    assert results["settings"]["sequence_length"] == 48


def test_clusters_of_documents_own_a_language_by_tokens(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("tfidf")
    results = evaluate(run, make_recipe("tfidf"))
    clusters = json.loads((run / "index" / "manifest.json").read_text())["clusters"]
    for row in results["languages"]:
        tokens = {name: found.get(row["code"], {"tokens": 0})["tokens"] for name, found in clusters.items()}
        assert tokens[row["own"]] == max(tokens.values())
    assert results["models"]["mixture-language"]["languages"] == results["models"]["own"]["languages"]
    ensemble = load_ensemble(run / "ensemble")
    assert ensemble.data.centres is not None and ensemble.data.centres.shape[0] == 3


def test_a_fitted_router_space_sends_each_language_home(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    build_ensemble(make_recipe("language"), run, run / "ensemble")
    ensemble = load_ensemble(run / "ensemble")
    router = ensemble.router("tfidf")
    for number, name in enumerate(ensemble.experts):
        for text in texts_of(run, name):
            ids = ensemble.tokenizer.encode([text])[0]
            assert int(router.weights(router.start([Request(ids)]))[0].argmax()) == number
    result = generate(ensemble, ["кот"], max_new_tokens=3, router="tfidf", top_m=1, stop_at_eos=False)[0]
    assert result.mean_weights()["ru"] > 0.5


def test_top_m_and_temperature_of_the_recipe_count(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    first = evaluate(run, make_recipe("language"))
    for name in ("ensemble", "evaluation"):
        shutil.rmtree(run / name)
    second = evaluate(run, make_recipe("language", ensemble={"top_m": 1, "temperature": 5.0}))
    assert second["models"]["mixture-uniform"]["label"] == "uniform mixture, top 1"
    # Uniform weights with m = 1 leave the first expert alone.
    assert second["models"]["mixture-uniform"]["languages"]["ja"]["bits_per_byte"] == pytest.approx(second["experts"]["en"]["ja"])
    assert first["models"]["mixture-tfidf"]["languages"] != second["models"]["mixture-tfidf"]["languages"]


def test_a_fallback_takes_part_without_being_an_expert(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    wanted = {"fallback": "dense", "fallback_weight": 0.2, "fallback_quantile": 0.9, "combine": "logit_mean", "posterior_prior": "tokens"}
    wanted |= {
        "posterior_decay": "one-step",
        "refresh": "chunk",
        "refresh_tokens": 5,
        "temperature_on": "experts",
        "detect_language": False,
    }
    results = evaluate(run, make_recipe("language", ensemble=wanted, evaluation={"routers": ["uniform", "language", "tfidf"]}))
    assert list(results["experts"]) == ["en", "ja", "ru"]
    ensemble = load_ensemble(run / "ensemble")
    assert (ensemble.experts, ensemble.fallback) == (["en", "ja", "ru", "dense"], "dense")
    assert (run / "ensemble/experts/dense/model.safetensors").samefile(run / "experts/dense/export/model.safetensors")
    data = ensemble.data
    assert (data.posterior_decay, data.refresh, data.refresh_tokens, data.detect_language) == (0.0, "chunk", 5, False)
    clusters = json.loads((run / "index" / "manifest.json").read_text())["clusters"]
    assert data.posterior_prior == [float(clusters[name][name]["tokens"]) for name in ("en", "ja", "ru")]
    assert "dense" not in data.language_expert.values()
    assert (ensemble.settings.combine, ensemble.settings.temperature_on) == ("logit_mean", "experts")
    # The distances are those of the sample, so half of it is at most as far as the median.
    vectors = torch.from_numpy(data.space.transform([text for code in ("en", "ja", "ru") for text in texts_of(run, code)])).double()
    nearest = torch.cdist(vectors, data.centres.double()).square().amin(-1)
    assert data.fallback_distance == pytest.approx(nearest.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist(), abs=1e-5)
    router = ensemble.router("tfidf")
    known, far = (
        router.weights(router.start([Request(ensemble.tokenizer.encode([text])[0])]))[0] for text in (texts_of(run, "ru")[0], "ωψχ")
    )
    assert float(known[3].exp()) < 0.3 < float(far[3].exp())


def test_without_dense_there_is_no_verdict(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    shutil.rmtree(run / "experts" / "dense")
    (run / "account.json").unlink()
    results = evaluate(run, make_recipe("language", experts={"dense": False}))
    assert results["verdict"] is None and results["account"] is None and "dense" not in results["models"]


def test_fixed_router_is_evaluated_when_asked(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    sections = {"ensemble": {"fixed_weights": {"ru": 2.0}}, "evaluation": {"routers": ["fixed"]}}
    results = evaluate(make_run("language"), make_recipe("language", **sections))
    assert results["models"]["mixture-fixed"]["languages"]["en"]["bits_per_byte"] == pytest.approx(results["experts"]["ru"]["en"])


class CuttingTokenizer:
    """Cuts at whole characters; a token is a byte."""

    def cut(self, text: str, max_tokens: int) -> tuple[list[int], int]:
        kept = text.encode()[:max_tokens].decode("utf-8", "ignore").encode()
        return list(kept), len(kept)


def test_held_out_counts_the_bytes_of_the_cut_text_of_the_first_documents(make_run: MakeRun) -> None:
    run = make_run("language")
    held_out = read_held_out(dict.fromkeys(("ja", "ru"), run / "corpus" / "valid"), CuttingTokenizer(), 2, 8)  # type: ignore[arg-type]
    assert held_out["ja"].ids == [list("猫が".encode()), list("犬が".encode())]
    assert (held_out["ja"].bytes, held_out["ja"].tokens, held_out["ru"].bytes) == (12, 12, 15)


def test_documents_of_which_nothing_is_left_are_passed_over(make_run: MakeRun) -> None:
    run = make_run("language")
    lines = [json.dumps({"text": text, "id": text, "language": "ru"}) for text in ("ж", "a")]
    (run / "corpus" / "valid" / "ru.jsonl").write_text("\n".join(lines) + "\n")
    assert read_held_out({"ru": run / "corpus" / "valid"}, CuttingTokenizer(), 5, 1)["ru"].ids == [[ord("a")]]  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_language_without_held_out_text_is_an_error(damage: str, make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    path = run / "corpus" / "valid" / "ja.jsonl"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("")
    with pytest.raises(MegaxelmError, match="no held-out text for the language 'ja'.*corpus.held_out.share"):
        evaluate(run, make_recipe("language"))


def test_a_missing_export_names_the_model(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    shutil.rmtree(run / "experts" / "dense" / "export")
    with pytest.raises(MegaxelmError, match="`dense` has no export"):
        evaluate(run, make_recipe("language"))
    shutil.rmtree(run / "experts" / "ja" / "export")
    with pytest.raises(MegaxelmError, match="expert ja: no export"):
        build_ensemble(make_recipe("language"), run, run / "again")


def test_fixed_weights_of_unknown_experts_stop_the_build(make_run: MakeRun, make_recipe: MakeRecipe) -> None:
    run = make_run("language")
    with pytest.raises(MegaxelmError, match=r"ensemble.fixed_weights: no expert fr; the experts are en, ja, ru"):
        build_ensemble(make_recipe("language", ensemble={"fixed_weights": {"fr": 1.0}}), run, run / "ensemble")


def test_an_expert_without_documents_in_the_sample_has_no_centre() -> None:
    vectors = torch.eye(3).numpy()
    with pytest.raises(MegaxelmError, match="expert b has no document"):
        mean_centres(vectors, torch.tensor([0, 0, 2]).numpy(), ["a", "b", "c"])


def test_language_of_split_clusters_goes_where_most_tokens_are() -> None:
    tokens = {"c00": {"de": 10, "fr": 5}, "c01": {"de": 4, "fr": 50}, "c02": {}}
    assert language_experts(None, tokens) == {"de": "c00", "fr": "c01"}
    assert language_experts({"a": ["de", "fr"]}, tokens) == {"de": "a", "fr": "a"}


def test_own_expert_is_where_most_tokens_of_the_language_are() -> None:
    clusters = {"c00": {"de": {"tokens": 4}}, "c01": {"de": {"tokens": 9}, "fr": {"tokens": 1}}, "c02": {"de": {"tokens": 5}}}
    assert own_experts(clusters, ["de", "fr"]) == {"de": "c01", "fr": "c01"}


def test_broken_weights_are_an_error_and_not_a_number_in_the_table() -> None:
    with pytest.raises(MegaxelmError, match="`seed`.*'de'.*train it again"):
        document_nats("seed", "de", [torch.tensor([-1.0, math.nan])])
