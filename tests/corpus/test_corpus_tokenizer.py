"""The tokenizer: any text comes back, same ids as SentencePiece, cuts are exact, the folder loads elsewhere."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megaxelm.corpus.document import Document
from megaxelm.corpus.tokenizer import Tokenizer, build_tokenizer, equal_shares, sample_sentences
from megaxelm.errors import TokenizerError
from megaxelm.recipe import Recipe, parse_recipe

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/corpus"
LANGUAGES = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"]
LINES = {
    "en": "the quick brown fox jumps over the lazy dog number",
    "ru": "съешь ещё этих мягких булок",
    "zh": "人人生而自由，在尊严和权利上一律平等",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों",
}
NASTY = [
    "",
    " ",
    "  two  spaces \n\n and lines\r\n\ttab \n",
    "\nnewline first",
    "emoji \U0001f469\u200d\U0001f469\u200d\U0001f467 and \U0001d518",
    "</s><s><pad><unk> <0x41><0xFF> written out",
    "\u2581\u2582\u2583 \u2581 \u2581\u2581a",
    "NUL \x00 and no-break\u00a0space and \u3000 wide",
    "cafe\u0301 is not caf\u00e9 and \ufb01 is not fi",
]


def recipe(vocab_size: int = 500, sample_bytes: int = 1_000_000, **tokenizer: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "t",
            "corpus": {"train": "x.jsonl"},
            "clusters": {"partitioner": "language"},
            "tokenizer": {"vocab_size": vocab_size, "sample_bytes": sample_bytes, **tokenizer},
            "train": {"document_mask": tokenizer.get("begin_of_document", True)},
        }
    )


def write_corpus(folder: Path, texts: dict[str, list[str]]) -> Path:
    """A corpus folder with nothing but what the tokenizer reads."""
    (folder / "sample").mkdir(parents=True)
    sizes = {}
    for code, items in texts.items():
        rows = [{"text": text, "id": str(i), "language": code} for i, text in enumerate(items)]
        (folder / "sample" / f"{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes[code] = {"sample_bytes": sum(len(text.encode()) for text in items)}
    (folder / "manifest.json").write_text(json.dumps({"languages": sizes}))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = {code: ["".join(rng.choices(line.replace(" ", ""), k=rng.randint(2, 5))) for _ in range(80)] for code, line in LINES.items()}
    texts = {code: [f"{line} {i}\n  {' '.join(rng.choices(words[code], k=12))}" for i in range(100)] for code, line in LINES.items()}
    return write_corpus(tmp_path_factory.mktemp("small") / "corpus", texts)


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(recipe(), corpus, out)
    return Tokenizer.load(out)


def read_shared(split: str, language: str, max_bytes: int) -> list[str]:
    texts, size = [], 0
    with open(SHARED / split / f"{language}.jsonl.zst", "rb") as file:
        for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)):
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size >= max_bytes:
                break
    return texts


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if not SHARED.is_dir():
        pytest.skip("the shared corpus is not here")
    folder = tmp_path_factory.mktemp("real")
    corpus = write_corpus(folder / "corpus", {code: read_shared("train", code, 40_000) for code in LANGUAGES})
    (folder / "tokenizer").mkdir()
    build_tokenizer(recipe(4096), corpus, folder / "tokenizer")
    return Tokenizer.load(folder / "tokenizer")


def assert_comes_back(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)
    assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert_comes_back(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), max_size=40))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert_comes_back(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab \n\u2581<>/s0x4\u4eba\U0001f469e\u0301", max_size=30), cut=st.integers(0, 40))
def test_a_cut_is_a_prefix_of_the_text_and_of_its_ids(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids, num_bytes = tokenizer.cut(text, cut)
    assert len(ids) <= cut
    assert ids == tokenizer.encode([text])[0][: len(ids)]
    assert tokenizer.decode(ids).encode() == text.encode()[:num_bytes]
    assert num_bytes == len(text.encode()) or len(ids) > cut - 4


def test_a_cut_inside_a_character_goes_back_to_its_beginning(tokenizer: Tokenizer) -> None:
    assert tokenizer.cut("\U0001f469x", 3) == ([], 0)
    assert tokenizer.cut("\U0001f469x", 4)[1] == 4
    assert tokenizer.cut("\U0001f469x", 9)[1] == 5


def test_real_text_of_sixteen_languages_comes_back_with_the_ids_of_sentencepiece(real: Tokenizer) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(real.folder / "tokenizer.model"))
    for language in LANGUAGES:
        texts = read_shared("valid", language, 20_000)
        encoded = real.encode(texts)
        assert encoded == peer.encode(texts)
        assert [real.decode(ids) for ids in encoded] == texts
        assert len(encoded[0]) < len(texts[0].encode())
        for text in texts[:3]:
            ids, num_bytes = real.cut(text, 20)
            assert text.encode().startswith(real.decode(ids).encode())
            assert len(real.decode(ids).encode()) == num_bytes


def test_special_ids_and_documents(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.start_id) == (1, 2, 1)
    assert tokenizer.document([7, 8]) == [1, 7, 8, 2]
    assert tokenizer.vocab_size == 500 == len(tokenizer.hf)


def test_without_begin_of_document_eos_stands_in_front(corpus: Path, tmp_path: Path) -> None:
    build_tokenizer(recipe(begin_of_document=False), corpus, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.document([7, 8]) == [7, 8, 2]
    assert tokenizer.start_id == 2
    assert tokenizer.hf("fox").input_ids[0] == 2


def test_the_folder_loads_with_transformers_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(tokenizer.folder, folder)
    hf = AutoTokenizer.from_pretrained(str(folder))
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id, hf.unk_token_id) == (1, 2, 3, 0)
    for text in NASTY[:5]:
        ids = hf(text).input_ids
        assert ids == [1, *tokenizer.encode([text])[0]]
        assert hf.decode(ids, skip_special_tokens=True) == text
    hf.save_pretrained(str(tmp_path / "saved"))
    again = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert again("the lazy dog").input_ids == hf("the lazy dog").input_ids


def test_training_gives_the_same_tokenizer_again(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_tokenizer(recipe(), corpus, tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_training_shows_a_clock_and_nothing_of_sentencepiece(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_tokenizer(recipe(), corpus, tmp_path)
    output, errors = capfd.readouterr()
    assert output == ""
    assert {line.split(" (")[0] for line in errors.replace("\r", "\n").splitlines() if line.strip()} == {
        "tokenizer: training SentencePiece"
    }


@pytest.mark.parametrize(
    ("size", "message"), [(50_000, r"vocab_size = 50000 is too large .* set it to \d+ or less"), (300, "too small for the characters")]
)
def test_a_size_that_does_not_fit_the_text_is_an_error_with_one_that_does(corpus: Path, tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        build_tokenizer(recipe(size), corpus, tmp_path)


def test_the_named_size_is_possible(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        build_tokenizer(recipe(50_000), corpus, tmp_path)
    build_tokenizer(recipe(int(str(error.value).split("set it to ")[1].split()[0])), corpus, tmp_path)


def test_a_loaded_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    build_tokenizer(recipe(load=str(tokenizer.folder)), corpus, tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(NASTY) == tokenizer.encode(NASTY)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (1, 2, 500)
    assert (tmp_path / "tokenizer.model").is_file()


def test_a_tokenizer_without_bos_or_eos_is_refused(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    for missing, message in (("bos_token", "begin_of_document = false"), ("eos_token", "no EOS")):
        folder = tmp_path / missing
        shutil.copytree(tokenizer.folder, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config[missing]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(TokenizerError, match=message):
            build_tokenizer(recipe(load=str(folder)), corpus, tmp_path)


def test_nothing_to_load_is_an_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        build_tokenizer(recipe(load=str(tmp_path / "empty")), corpus, tmp_path)
    with pytest.raises(TokenizerError, match="megaxelm_tokenizer.json"):
        Tokenizer.load(tmp_path / "empty")


def test_a_changed_tokenizer_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(tokenizer.folder, tmp_path / "x")
    path = tmp_path / "x" / "tokenizer.json"
    path.write_text(path.read_text().replace('"the"', '"teh"', 1) + " ")
    with pytest.raises(TokenizerError, match="was changed after it was made"):
        Tokenizer.load(tmp_path / "x")


def test_languages_get_equal_bytes_and_small_ones_all_they_have() -> None:
    assert equal_shares({"en": 1000, "ru": 900, "sw": 100}, 1000) == {"en": 450, "ru": 450, "sw": 100}
    assert equal_shares({"en": 10, "sw": 20}, 1000) == {"en": 10, "sw": 20}


def test_sentences_are_short_and_lose_no_text(tmp_path: Path) -> None:
    text = "word " * 1000 + "\n" + "\u4eba" * 2500
    folder = write_corpus(tmp_path / "c", {code: [Document(text, "0", code).text] for code in ("en", "zh")})
    sentences = list(sample_sentences(folder, 10**6))
    assert max(map(len, sentences)) <= 1000
    assert "".join(sentences) == 2 * text.replace("\n", "").rstrip() or "".join(sentences) == 2 * text.replace("\n", "")
