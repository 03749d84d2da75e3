"""lm-evaluation-harness on a mixture: the numbers are those of a plain fp64 mixture, and real tasks run from local files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_ensemble import NAMES, write_byte_ensemble

from megaxelm.cli import app
from megaxelm.console import run_guarded
from megaxelm.ensemble.continuations import Pair, score_continuations
from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import score_documents
from megaxelm.errors import RoutingError

XCOPA = Path(__file__).resolve().parents[2] / "../shared/data/eval/xcopa/val"
CONTEXT = "the cat sat on the mat and "
ROUTERS = ["tfidf", "posterior", "uniform", "language"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_ensemble(tmp_path_factory.mktemp("byte"))


@pytest.fixture(scope="module")
def ensemble(folder: Path) -> Ensemble:
    return load_ensemble(folder)


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@torch.no_grad()
def plain_continuation(ensemble: Ensemble, router_name: str, combine: str, context: str, continuation: str) -> tuple[float, bool]:
    """From full logits of the whole text in fp64."""
    ids = ensemble.tokenizer.encode([context + continuation])[0]
    first = len(ids) - len(ensemble.tokenizer.encode([continuation])[0])
    tokens, bounds = torch.tensor([1, *ids[:-1]]), torch.tensor([0, len(ids)], dtype=torch.int32)
    decoders = [ensemble.decoder(number) for number in range(3)]
    logits = torch.stack([decoder.logits(decoder(tokens, torch.arange(len(ids)), bounds)).double() for decoder in decoders], 1)
    labels = torch.tensor(ids)
    own = logits.log_softmax(-1)
    router = ensemble.router(router_name)
    log_w = router.along(Request((), "ru"), ids, own.gather(-1, labels.view(-1, 1, 1).expand(-1, 3, 1))[..., 0].T)
    if combine == "mixture":
        mixed = (own + log_w[..., None]).logsumexp(1)
    else:
        mixed = torch.nan_to_num(logits * log_w.exp()[..., None]).sum(1).log_softmax(-1)
    picked = mixed[torch.arange(len(ids)), labels][first:]
    return float(picked.sum()), bool((mixed.argmax(-1) == labels)[first:].all())


@pytest.mark.parametrize("combine", ["mixture", "logit_mean"])
@pytest.mark.parametrize("router", ROUTERS)
def test_continuations_have_the_likelihood_and_the_arg_max_of_the_plain_mixture(router: str, combine: str, ensemble: Ensemble) -> None:
    chosen = ensemble.router(router)
    greedy = generate(ensemble, [CONTEXT], ["ru"], max_new_tokens=3, router=router, combine=combine, stop_at_eos=False)[0].token_ids
    context = ensemble.tokenizer.encode([CONTEXT])[0]
    texts = [(CONTEXT, "dog"), (CONTEXT, "x"), ("", "кот"), ("a", "")]
    pairs = [Pair(*(ensemble.tokenizer.encode([part])[0] for part in text), "ru") for text in texts]
    options: dict[str, Any] = {"combine": combine, "token_budget": 40}
    scores = score_continuations(ensemble.decoders, pairs, 1, chosen, batch_size=2, **options)
    for score, text in zip(scores, texts, strict=True):
        log_likelihood, is_greedy = plain_continuation(ensemble, router, combine, *text) if text[1] else (0.0, True)
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=2e-4) and score.is_greedy == is_greedy
    found = score_continuations(
        ensemble.decoders, [Pair(context, greedy, "ru"), Pair(context, [*greedy[:2], 7], "ru")], 1, chosen, **options
    )
    assert [score.is_greedy for score in found] == [True, False]


def test_a_continuation_is_the_end_of_its_document_to_the_bit(ensemble: Ensemble) -> None:
    context, continuation = (ensemble.tokenizer.encode([text])[0] for text in (CONTEXT, "собака"))
    for router in ("tfidf", "posterior"):
        whole = score_documents(ensemble.decoders, [[*context, *continuation]], 1, ensemble.router(router))[0]
        (found,) = score_continuations(ensemble.decoders, [Pair(context, continuation)], 1, ensemble.router(router))
        assert found.log_likelihood == pytest.approx(float(whole[len(context) :].sum()), rel=1e-6)


@pytest.mark.parametrize("router", ["uniform", "posterior", "tfidf"])
def test_a_context_that_is_too_long_is_cut_on_the_left(router: str, ensemble: Ensemble) -> None:
    """Three times the same expert: whatever the router, the mixture is that expert after the last 64 tokens."""
    decoder = ensemble.decoder(1)
    # Of the 95 tokens of context the router is told in windows, of which one would end amid the continuation.
    context, continuation = (ensemble.tokenizer.encode([text])[0] for text in ((CONTEXT * 4)[:95], "a dog"))
    document = [*context, *continuation]
    (found,) = score_continuations([lambda: decoder] * 3, [Pair(context, continuation)], 1, ensemble.router(router))
    read = torch.tensor(document[-65:-1])
    alone = decoder.score(read, torch.arange(64), torch.tensor([0, 64]), torch.tensor(document[-64:])).target_logprob
    assert found.log_likelihood == pytest.approx(float(alone[-5:].double().sum()), abs=1e-4)


def test_experts_without_weight_do_not_run(ensemble: Ensemble) -> None:
    read: list[int] = []

    def loader(expert: int) -> Any:
        return lambda: read.append(expert) or ensemble.decoder(expert)  # type: ignore[func-returns-value]

    pairs = [Pair([50], [60], "ru"), Pair([50], [61], "ru"), Pair([50], [], "en")]
    score_continuations([loader(number) for number in range(3)], pairs, 1, ensemble.router("language"))
    assert set(read) == {1}


@pytest.fixture(scope="module")
def lm(ensemble: Ensemble) -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from megaxelm.evaluate.harness import XelmLM

    return XelmLM(ensemble, router="tfidf", batch_size=2)


def test_the_harness_asks_for_texts(lm: Any, ensemble: Ensemble) -> None:
    requests = [request(CONTEXT.strip(), " dog"), request("", "кот"), request("the cat ", "sat")]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (log_likelihood, is_greedy), each in zip(found, requests, strict=True):
        expected = plain_continuation(ensemble, "tfidf", "mixture", *(each.args if each.args[0] != "the cat " else ("the cat", " sat")))
        assert log_likelihood == pytest.approx(expected[0], abs=2e-4) and is_greedy == expected[1]


def test_rolling_likelihood_is_that_of_the_windows_of_the_harness(lm: Any, ensemble: Ensemble) -> None:
    from lm_eval.utils import get_rolling_token_windows

    text = CONTEXT * 5
    uniform = type(lm)(ensemble, router="uniform")
    (found, empty) = uniform.loglikelihood_rolling([request(text), request("")], disable_tqdm=True)
    expected, decoders = 0.0, [ensemble.decoder(number) for number in range(3)]
    for read, scored in get_rolling_token_windows(ensemble.tokenizer.encode([text])[0], 1, 64, 1):
        tokens, bounds = torch.tensor(read), torch.tensor([0, len(read)])
        labels = torch.tensor([0] * (len(read) - len(scored)) + scored)
        own = [decoder.score(tokens, torch.arange(len(read)), bounds, labels).target_logprob.double() for decoder in decoders]
        expected += float((torch.stack(own).logsumexp(0) - torch.tensor(3.0).log())[-len(scored) :].sum())
    assert found == pytest.approx(expected, rel=1e-6) and empty == 0.0


def test_generation_stops_where_the_task_says(lm: Any, ensemble: Ensemble) -> None:
    prompts = ["the cat", "a", "кот сидел " * 12]
    whole = [generate(ensemble, [prompt], max_new_tokens=12, router="tfidf")[0].text for prompt in prompts[:2]]
    stop = "6\ufffd"
    assert whole[0].index(stop) > 0 and whole[0].index("\ufffd") > whole[0].index(stop)
    settings = {"until": ["\ufffd", stop, ""], "max_gen_toks": 12}
    found = lm.generate_until([request(prompts[0], settings), request(prompts[1], {"max_gen_toks": 12})], disable_tqdm=True)
    assert found == [whole[0][: whole[0].index(stop)], whole[1]]
    short = lm._fitting(prompts[2], 12)
    assert prompts[2].endswith(short) and 45 <= len(short.encode()) <= 52
    draw = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "seed": 4, "until": []}
    greedy, drawn = (generate(ensemble, ["the cat"], max_new_tokens=6, temperature=t, seed=4, router="tfidf")[0].text for t in (0.0, 1.0))
    assert greedy != drawn
    # Requests of a batch that ask for different things.
    both = lm.generate_until([request("the cat", {"max_gen_toks": 6, "until": []}), request("the cat", draw)], disable_tqdm=True)
    assert both == [greedy, drawn]
    with pytest.raises(RoutingError, match="num_beams"):
        lm.generate_until([request("a", {"num_beams": 3})], disable_tqdm=True)
    with pytest.raises(RoutingError, match="max_gen_toks = 64: the experts have 64 positions"):
        lm.generate_until([request("a", {"max_gen_toks": 64})], disable_tqdm=True)


def test_the_model_is_registered_by_name(lm: Any, folder: Path) -> None:
    from lm_eval.api.registry import get_model

    made = get_model("xelm").create_from_arg_string(f"pretrained={folder},router=uniform,top_m=2", {"batch_size": 3, "device": "cpu"})
    assert (made.router.name, made.top_m, made.batch_size) == ("uniform", 2, 3)
    assert made.get_model_info()["experts"] == list(NAMES)
    with pytest.raises(RoutingError, match="batch_size = 'many'"):
        type(made)(folder, batch_size="many")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
  cache_dir: {cache}
output_type: multiple_choice
validation_split: validation
test_split: validation
doc_to_text: "{{{{premise[:-1]}}}} {{{{'because' if question == 'cause' else 'so'}}}}"
doc_to_target: label
doc_to_choice: "{{{{[choice1[0]|lower + choice1[1:], choice2[0]|lower + choice2[1:]]}}}}"
metric_list:
  - metric: acc
"""

DOCUMENTS = [
    {"premise": "The cat sat.", "choice1": "It slept.", "choice2": "It ran.", "question": "effect", "label": 0},
    {"premise": "A dog ran.", "choice1": "It saw a cat.", "choice2": "Rain fell.", "question": "cause", "label": 1},
    {"premise": "Rain fell.", "choice1": "A park.", "choice2": "The mat was wet.", "question": "effect", "label": 1},
]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_a_task_of_local_files_from_the_command_line(
    capsys: pytest.CaptureFixture[str], folder: Path, ensemble: Ensemble, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "tasks").mkdir()
    task = TASK.format(name="tiny_copa", data=tmp_path / "data.jsonl", cache=tmp_path / "cache")
    (tmp_path / "tasks" / "tiny.yaml").write_text(task)
    arguments = ("evaluate", folder.parent, "--tasks", "tiny_copa", "--include_path", tmp_path / "tasks", "--router", "uniform")
    code, out, errors = command(capsys, *arguments, "--output", tmp_path / "out" / "results.json")
    assert code == 0 and "tiny_copa" in out, errors
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    right = 0
    for document in DOCUMENTS:
        context = f"{document['premise'][:-1]} {'because' if document['question'] == 'cause' else 'so'}"  # type: ignore[index]
        choices = [f" {choice[0].lower()}{choice[1:]}" for choice in (document["choice1"], document["choice2"])]  # type: ignore[index]
        scores = [plain_continuation(ensemble, "uniform", "mixture", context, choice)[0] for choice in choices]
        right += scores.index(max(scores)) == document["label"]
    assert found["results"]["tiny_copa"]["acc,none"] == pytest.approx(right / 3)
    assert found["config"]["router"] == "uniform" and found["config"]["experts"] == list(NAMES)
    assert command(capsys, *arguments, "--expert", "e0")[0] == 2, "a router and an expert"
    assert command(capsys, *arguments, "--limit", "2", "--output", tmp_path / "two.json")[0] == 0
    assert json.loads((tmp_path / "two.json").read_text())["n-samples"]["tiny_copa"]["effective"] == 2


@pytest.mark.slow
def test_an_unknown_task_is_told(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    """Slow: the harness reads thousands of task files to know its own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    code, _, errors = command(capsys, "evaluate", folder, "--tasks", "no_such_task", "--include_path", tmp_path)
    assert code == 2 and "no_such_task" in errors and "knows no such task" in errors
    code, _, errors = command(capsys, "evaluate", folder, "--tasks", "xcopa_sw", "--include_path", tmp_path / "nowhere")
    assert code == 2 and "no such folder" in errors


def test_options_of_tasks_without_tasks_are_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for option, value in (("--limit", "3"), ("--batch-size", "3"), ("--output", "x.json")):
        code, _, errors = command(capsys, "evaluate", folder, option, value)
        assert code == 2 and f"{option}: belongs to --tasks" in errors
    code, _, errors = command(capsys, "evaluate", folder, "--tasks", ",")
    assert code == 2 and "names no task" in errors


def test_a_missing_harness_is_told_with_its_pip_line(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "megaxelm.evaluate.harness", raising=False)
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    code, _, errors = command(capsys, "evaluate", folder, "--tasks", "xcopa_sw")
    assert code == 2 and "pip install 'megaxelm[eval]'" in errors


@pytest.mark.slow
@pytest.mark.parametrize("language", ["sw", "zh"])
def test_xcopa_from_local_files(language: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    data = (XCOPA / f"{language}.jsonl").resolve()
    if not data.is_file():
        pytest.skip("the shared files of XCOPA are not here")
    folder = write_byte_ensemble(tmp_path / "byte", max_positions=512)
    task = TASK.format(name=f"local_xcopa_{language}", data=data, cache=tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "xcopa.yaml").write_text(task)
    arguments = ("--tasks", f"local_xcopa_{language}", "--include_path", tmp_path / "tasks", "--output", tmp_path / "results.json")
    code, out, errors = command(capsys, "evaluate", folder, *arguments)
    assert code == 0, errors
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["n-samples"][f"local_xcopa_{language}"]["effective"] == 100
    assert 0.25 < found["results"][f"local_xcopa_{language}"]["acc,none"] < 0.75
