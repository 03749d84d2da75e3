"""The ensemble as a transformers model: its own search and sampling on the mixture, with a cache that beams may reorder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_ensemble import NAMES, write_byte_ensemble
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import megaxelm.ensemble.huggingface_cache as huggingface_cache
from megaxelm.auto_classes import register_with_transformers
from megaxelm.cluster.space import TfidfSpace
from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.huggingface import XelmForCausalLM
from megaxelm.ensemble.huggingface_config import XelmConfig
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import score_documents
from megaxelm.errors import RoutingError
from megaxelm.model.decoder import Decoder
from megaxelm.recipe import TfidfConfig

PROMPTS = ["the cat", "кот сидел", "a"]
LANGUAGES = ["en", "ru", "en"]
CHOICES = [("tfidf", None), ("tfidf", 2), ("posterior", None), ("uniform", 1), ("fixed", None), ("language", None)]
PAD = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_ensemble(tmp_path_factory.mktemp("byte"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> XelmForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def model(loaded: XelmForCausalLM) -> XelmForCausalLM:
    loaded.set_router()
    loaded.set_languages(None)
    return loaded


@pytest.fixture(scope="module")
def batch(folder: Path) -> Any:
    """The prompts, padded on the left."""
    return AutoTokenizer.from_pretrained(folder, padding_side="left")(PROMPTS, return_tensors="pt", padding=True)


@torch.no_grad()
def plain_logprobs(model: XelmForCausalLM, ids: list[int], router_name: str, top_m: int | None, language: str) -> torch.Tensor:
    """Mixture [tokens, vocab] after each of `ids` (start token in front), by whole forwards of the experts in fp64 and single steps."""
    tokens, bounds = torch.tensor(ids), torch.tensor([0, len(ids)])
    own = torch.stack(
        [decoder.logits(decoder(tokens, torch.arange(len(ids)), bounds)).double().log_softmax(-1) for decoder in model.experts], 1
    )
    router = model.ensemble.router(router_name)
    state = router.start([Request((), language)])
    found = []
    for position in range(len(ids)):
        if position:
            given = own[position - 1, :, ids[position]].unsqueeze(0) if router.needs_expert_logprobs else None
            router.update(state, tokens[position : position + 1], given)
        log_w = router.weights(state)[0]
        kept = log_w.argsort(descending=True, stable=True)[: top_m or 3]
        found.append((own[position, kept] + log_w[kept].log_softmax(-1)[:, None]).logsumexp(0))
    return torch.stack(found)


def texts_of(batch: Any) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_the_auto_classes_know_the_folder(loaded: XelmForCausalLM, folder: Path) -> None:
    assert type(loaded) is XelmForCausalLM and AutoConfig.from_pretrained(folder).model_type == "xelm"
    assert loaded.num_parameters() == sum(parameter.numel() for expert in loaded.experts for parameter in expert.parameters())
    assert (loaded.config.vocab_size, loaded.config.max_position_embeddings) == (260, 64)
    settings = loaded.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("кот").input_ids == [1, *loaded.ensemble.tokenizer.encode(["кот"])[0]]


@pytest.mark.slow
def test_megaxelm_may_be_imported_first(folder: Path) -> None:
    program = f"""
import sys
import megaxelm
assert not {{"transformers", "torch"}} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(type(model).__name__, model.router.name, "AfterImport" in str(sys.meta_path))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["XelmForCausalLM", "posterior", "False"], done.stderr


def test_transformers_may_be_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "xelm")
    register_with_transformers()
    assert CONFIG_MAPPING["xelm"].__name__ == "XelmConfig" and "AfterImport" not in str(sys.meta_path)


@pytest.mark.parametrize(("router", "top_m"), CHOICES)
def test_logits_are_the_mixture_at_every_place_of_padded_rows(router: str, top_m: int | None, model: XelmForCausalLM, batch: Any) -> None:
    model.set_router(router, top_m=top_m)
    model.set_languages(LANGUAGES)
    right = [torch.tensor(ids + [PAD] * (batch.input_ids.shape[1] - len(ids))) for ids in texts_of(batch)]
    rights = torch.stack(right), torch.stack([(ids != PAD).long() for ids in right])
    for input_ids, mask in ((batch.input_ids, batch.attention_mask), rights):
        logits = model(input_ids, attention_mask=mask).logits
        for row, ids in enumerate(texts_of(batch)):
            expected = plain_logprobs(model, ids, router, top_m, LANGUAGES[row])
            assert torch.allclose(logits[row, mask[row].bool()].double(), expected, atol=2e-4)
        last = model(input_ids, attention_mask=mask, logits_to_keep=2).logits
        assert torch.allclose(last, logits[:, -2:], atol=2e-5)


def test_averaged_logits(model: XelmForCausalLM, batch: Any) -> None:
    model.set_router("tfidf", combine="logit_mean")
    found = generate(model.ensemble, PROMPTS, max_new_tokens=8, router="tfidf", combine="logit_mean", stop_at_eos=False)
    written = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)[:, -8:]
    expected = model(batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1).logits[:, 0]
    assert torch.allclose(expected.exp().sum(-1), torch.ones(3), atol=1e-5)
    for row, result in zip(written.tolist(), found, strict=True):
        assert row == result.token_ids or model.generation_config.eos_token_id in result.token_ids


@pytest.mark.parametrize(("router", "top_m"), CHOICES)
def test_greedy_search_writes_what_our_own_generation_writes(router: str, top_m: int | None, model: XelmForCausalLM, batch: Any) -> None:
    model.set_router(router, top_m=top_m)
    own = generate(model.ensemble, PROMPTS, LANGUAGES, max_new_tokens=16, router=router, top_m=top_m)
    written = model.generate(**batch, max_new_tokens=16, language=LANGUAGES)[:, batch.input_ids.shape[1] :].tolist()
    assert [[token for token in row if token != PAD] for row in written] == [result.token_ids for result in own]
    without = model.generate(**batch, max_new_tokens=16, language=LANGUAGES, use_cache=False)[:, batch.input_ids.shape[1] :]
    assert without.tolist() == written
    for row, ids in enumerate(texts_of(batch)):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=16, language=LANGUAGES[row])[0, len(ids) :].tolist()
        assert alone == [token for token in written[row] if token != PAD]
    assert model.generate(**batch, max_new_tokens=3, language=LANGUAGES, do_sample=True, top_k=1).tolist() == [
        [*ids, *new[:3]] for ids, new in zip(batch.input_ids.tolist(), written, strict=True)
    ]


@pytest.mark.parametrize("router", ["posterior", "tfidf"])
def test_with_fewer_experts_a_router_that_learns_hears_all_of_them(router: str, model: XelmForCausalLM, batch: Any) -> None:
    """The same with a cache and without, and as scoring has it."""
    model.set_router(router, top_m=1)
    kept = model.generate(**batch, max_new_tokens=10, min_new_tokens=10)
    assert torch.equal(kept, model.generate(**batch, max_new_tokens=10, min_new_tokens=10, use_cache=False))
    ids = kept[1, 1:].tolist()
    logits = model(kept[1:2]).logits[0, :-1].double()
    scored = score_documents(model.ensemble.decoders, [ids], 1, model.ensemble.router(router), top_m=1)[0]
    assert torch.allclose(logits[torch.arange(len(ids)), torch.tensor(ids)], scored, atol=2e-4)


def test_an_expert_alone_is_its_own_model(model: XelmForCausalLM, folder: Path, batch: Any) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder / "experts" / "e1", dtype=torch.float32)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 2}
    expected = theirs.generate(**batch, **settings)
    for setting in ({"expert": "e1"}, {"name": "fixed", "fixed_weights": {"e1": 1.0}}):
        model.set_router(**setting)
        assert torch.equal(model.generate(**batch, **settings), expected)
    assert torch.equal(model.generate(**batch, **settings, num_beams=3), theirs.generate(**batch, **settings, num_beams=3))


def plain_beams(model: XelmForCausalLM, ids: list[int], router: str, language: str, beams: int, steps: int) -> list[int]:
    """Beam search without end tokens, in fp64, each beam read anew at each step."""
    running = [(0.0, list(ids))]
    for _ in range(steps):
        grown = []
        for score, text in running:
            logprobs = plain_logprobs(model, text, router, None, language)[-1]
            logprobs[2] = -torch.inf
            values, tokens = logprobs.topk(beams)
            grown += [(score + value, [*text, token]) for value, token in zip(values.tolist(), tokens.tolist(), strict=True)]
        running = sorted(grown, key=lambda each: -each[0])[:beams]
    return running[0][1][len(ids) :]


@pytest.mark.parametrize("router", ["tfidf", "posterior", "language"])
def test_beam_search_is_a_plain_beam_search_in_fp64(router: str, model: XelmForCausalLM, batch: Any) -> None:
    model.set_router(router)
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "language": LANGUAGES}
    found = model.generate(**batch, **settings)[:, -5:].tolist()
    assert found == [plain_beams(model, ids, router, LANGUAGES[row], 3, 5) for row, ids in enumerate(texts_of(batch))]
    assert found != model.generate(**batch, max_new_tokens=5, min_new_tokens=5, language=LANGUAGES)[:, -5:].tolist(), "not greedy"
    both = model.generate(**batch, **settings, num_return_sequences=2)
    assert both.shape[0] == 6 and both[::2, -5:].tolist() == found


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_texts(model: XelmForCausalLM) -> None:
    """By the cumulative posterior the mixture of a text is the mean of the experts' probabilities of it: a table of all pairs of tokens."""
    model.set_router("posterior")
    ids = [1, 53, 246]
    texts = torch.tensor([[*ids, token] for token in range(260)])
    tables = []
    for decoder in model.experts:
        hidden = decoder(texts.flatten(), torch.arange(4).repeat(260), torch.arange(261) * 4)
        own = decoder.logits(hidden).double().log_softmax(-1).view(260, 4, 260)
        tables.append(sum(own[0, place, ids[place + 1]] for place in range(2)) + own[0, 2][:, None] + own[:, 3])
    table = torch.stack(tables).logsumexp(0)
    table[2], table[:, 2] = -torch.inf, -torch.inf
    best = divmod(int(table.argmax()), 260)
    settings: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2}
    assert tuple(model.generate(torch.tensor([ids]), **settings, num_beams=64)[0, 3:].tolist()) == best
    assert tuple(model.generate(torch.tensor([ids]), **settings)[0, 3:].tolist()) != best, "greedy search does not find it"


@pytest.mark.parametrize(("router", "top_m"), CHOICES)
def test_a_cache_in_another_order_goes_on_with_its_rows(
    router: str, top_m: int | None, model: XelmForCausalLM, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_cache, "_CACHE_STEP", 4)  # so that caches grow on the way
    model.set_router(router, top_m=top_m)
    model.set_languages(LANGUAGES)
    cache = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=True).past_key_values
    rows, ids, mask = [0, 1, 2], batch.input_ids, batch.attention_mask
    moves = [
        (lambda: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda: cache.batch_select_indices(torch.tensor([5, 0, 3])), [5, 0, 3]),
    ]
    for number, (move, order) in enumerate(moves):
        move()
        rows, ids, mask = [rows[row] for row in order], ids[order], mask[order]
        # Rows that come from one text go on differently.
        new = torch.tensor([[40 + 7 * number + row, 60 + row] for row in range(len(order))])
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        logits = model(new, attention_mask=mask, past_key_values=cache).logits
        assert cache.get_seq_length() == ids.shape[1] and cache.batch_size == len(order) and len(cache) == 3
        model.set_languages([LANGUAGES[row] for row in rows])
        whole = model(ids, attention_mask=mask).logits[:, -2:]
        assert torch.allclose(logits, whole, atol=2e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_a_text_in_pieces_of_any_size_gives_the_same(model: XelmForCausalLM, batch: Any) -> None:
    """Padded in every row, so that the first piece holds no text at all."""
    padding = torch.zeros(3, 2, dtype=torch.int64)
    ids, mask = torch.cat([padding + PAD, batch.input_ids], 1), torch.cat([padding, batch.attention_mask], 1)
    for router in ("tfidf", "posterior"):
        model.set_router(router, top_m=2)
        whole = model(ids, attention_mask=mask).logits
        cache, found = None, []
        for number, (begin, end) in enumerate(((0, 2), (2, 3), (3, 6), (6, 7), (7, ids.shape[1]))):
            name = ("past_key_values", "cache")[number % 2]  # what transformers called it until 5.23, and what since
            output = model(ids[:, begin:end], attention_mask=mask[:, :end], **{name: cache}, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        assert torch.allclose(torch.cat(found, 1), whole, atol=2e-4)


def test_states_that_refer_to_the_tokenizer_are_copied_without_it(tmp_path: Path) -> None:
    """A router that reads text keeps the tokenizer's decoder in its state."""
    model = AutoModelForCausalLM.from_pretrained(write_byte_ensemble(tmp_path))
    texts = ["the cat", "a dog", "кот"]
    space = TfidfSpace.fit(texts, TfidfConfig(analyzer="char", dimensions=2), 0, model.ensemble.tokenizer)
    centres = torch.from_numpy(space.transform(texts))
    model.ensemble.data.space, model.ensemble.data.centres = space, centres
    model.set_router("tfidf")
    input_ids = torch.tensor([[1, *model.ensemble.tokenizer.encode(["ко"])[0]]])
    cache = model(input_ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    (first, stream), (second, other) = (state[0] for state in cache.routers.states)
    assert first is not second and stream is not other and stream._decode.__self__ is other._decode.__self__
    new = torch.tensor([model.ensemble.tokenizer.encode(["т"])[0], [120, 121]])
    logits = model(new, past_key_values=cache).logits
    whole = model(torch.cat([input_ids.expand(2, -1), new], 1)).logits[:, -2:]
    assert torch.allclose(logits, whole, atol=2e-4)


def test_experts_without_weight_read_nothing(model: XelmForCausalLM, batch: Any) -> None:
    model.set_router("language")
    model.set_languages(LANGUAGES)
    cache = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=True).past_key_values
    assert [sorted(expert.rows) for expert in cache.experts] == [[0, 2], [1], []]
    assert cache.experts[1].read == [len(texts_of(batch)[1])] and cache.experts[2].cache is None


def test_the_loss_is_that_of_scoring(model: XelmForCausalLM, batch: Any) -> None:
    model.set_router("posterior")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    documents = [ids[1:] for ids in texts_of(batch)]
    scored = torch.cat(score_documents(model.ensemble.decoders, documents, 1, model.ensemble.router("posterior")))
    counted = [score for row, score in zip(texts_of(batch), scored.split([len(ids) for ids in documents]), strict=True) if len(row) > 1]
    # The longest row has no padding in front of its start token, the others do: the start token's place is then a label too.
    places = sum(len(ids) - 1 for ids in texts_of(batch))
    starts = sum(len(ids) < batch.input_ids.shape[1] for ids in texts_of(batch))
    assert float(loss) == pytest.approx(-float(torch.cat(counted).sum()) / (places + starts), rel=1e-5)
    assert isinstance(model(batch.input_ids, labels=batch.input_ids, return_dict=False), tuple)


def test_what_was_set_is_saved_with_the_weights_as_they_are(folder: Path, tmp_path: Path, batch: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.experts[1].norm.weight.mul_(0.5)
    model.set_router("tfidf", top_m=2, combine="logit_mean", temperature=0.05)
    model.save_pretrained(tmp_path / "again")
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "again", moved)
    again = AutoModelForCausalLM.from_pretrained(moved)
    assert (again.router.name, again.router.temperature, again.top_m, again.combine) == ("tfidf", 0.05, 2, "logit_mean")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert load_ensemble(moved).settings.top_m == 2 and sorted(path.name for path in (moved / "experts").iterdir()) == list(NAMES)
    assert not list(moved.glob(".saving*"))
    assert AutoTokenizer.from_pretrained(moved)("кот").input_ids[0] == 1
    model.set_router(expert="e1")
    with pytest.raises(RoutingError, match="e1 alone was set"):
        model.save_pretrained(tmp_path / "more")
    with pytest.raises(RoutingError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "more", push_to_hub=True)


def test_types_and_devices(folder: Path, tmp_path: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    assert half.dtype == torch.bfloat16 and half(torch.tensor([[1, 100]])).logits.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_a_row_of_padding_alone_is_passed_over(model: XelmForCausalLM) -> None:
    model.set_router("posterior")
    logits = model(torch.tensor([[PAD, PAD], [1, 100]]), attention_mask=torch.tensor([[0, 0], [1, 1]])).logits
    assert not logits[0].any() and torch.allclose(logits[1].exp().sum(-1), torch.ones(2), atol=1e-5)


IDS = torch.tensor([[1, 100], [1, 101]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(inputs_embeds=torch.zeros(1, 2, 32)), "inputs_embeds"),
        (lambda model: model(IDS, output_attentions=True), "output_attentions"),
        (lambda model: model(IDS, logits_to_keep=torch.tensor([1])), "logits_to_keep"),
        (lambda model: model(IDS, labels=IDS[:, :1]), "labels"),
        (lambda model: model(IDS, attention_mask=torch.ones(2, 3)), r"attention_mask \(2, 3\): expected \[2, 2\]"),
        (lambda model: model(IDS, past_key_values=DynamicCache()), "is a DynamicCache"),
        (lambda model: model(IDS, past_key_values=model(IDS[:1], use_cache=True).past_key_values), "has 1 rows, input_ids 2"),
        (lambda model: model(IDS, past_key_values=(past := model(IDS, use_cache=True)[-1]), cache=past), "two names of one thing"),
        (lambda model: model(IDS[:, :1].expand(2, 65)), "65 tokens is longer than the 64 positions of expert e0"),
        (lambda model: model.generate(IDS, language=["en", "ru", "en"], max_new_tokens=1), "3 languages for 2 rows"),
        (lambda model: model.set_router("best"), "router = 'best'"),
        (lambda model: model.set_router(top_m=9), "top_m = 9"),
        (lambda model: model(IDS, use_cache=True).past_key_values.crop(-1), "cannot take tokens back"),
        (lambda model: model(IDS, use_cache=True).past_key_values.update(), "filled by XelmForCausalLM only"),
        (lambda model: type(model)(model.config), "from_pretrained"),
        (lambda model: AutoModelForCausalLM.from_config(model.config), "from_pretrained"),
    ],
)
def test_what_a_mixture_cannot_do_is_told(call: Any, words: str, model: XelmForCausalLM) -> None:
    with pytest.raises(RoutingError, match=words):
        call(model)


def test_a_text_without_language_is_told(model: XelmForCausalLM) -> None:
    model.set_router("language")
    with pytest.raises(RoutingError, match="has no language"):
        model.generate(IDS, max_new_tokens=1)
    assert model.generate(IDS, max_new_tokens=1, language="en").shape == (2, 3)
    with pytest.raises(RoutingError, match="has no language"):
        model.generate(IDS, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization_config": {}}, "quantization_config: not known"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"device_map": {"experts": 0}}, "give one device"),
    ],
)
def test_loading_options_that_are_not_known_are_refused(options: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(RoutingError, match=words):
        XelmForCausalLM.from_pretrained(folder, **options)


def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "e")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    (tmp_path / "e" / "config.json").write_text(json.dumps(config | {"format": 9}))
    with pytest.raises(RoutingError, match="format = 9"):
        XelmForCausalLM.from_pretrained(tmp_path / "e")
    with pytest.raises(RoutingError, match="neither an ensemble folder nor on the hub"):
        XelmForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_the_start_token_is_no_text(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    """A space that counts every token it is given would count the start token too."""
    model = XelmForCausalLM(XelmConfig(), make_ensemble(decoders))
    model.set_router("tfidf")
    own = generate(model.ensemble, PROMPTS, max_new_tokens=1, router="tfidf")
    for ids, result in zip(model.ensemble.tokenizer.encode(PROMPTS), own, strict=True):
        cache = model(torch.tensor([[1, *ids]]), use_cache=True).past_key_values
        weights = cache.routers.router.weights(cache.routers.states[0])[0].exp()
        assert weights.tolist() == pytest.approx(result.weights[0], rel=1e-9)
