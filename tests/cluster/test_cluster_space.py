"""The TF-IDF space: against scikit-learn's own vectoriser, and the incremental form against the whole."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from megaxelm.cluster.analyzers import CharAnalyzer, SubwordAnalyzer, TermState, WordAnalyzer, make_analyzer, reads_text
from megaxelm.cluster.space import TfidfSpace
from megaxelm.errors import ClusterError
from megaxelm.recipe import TfidfConfig

TEXTS = [
    "The cat sat on the mat, and the dog barked at the cat.",
    "Der Hund bellt, und die Katze sitzt auf der Matte.",
    "猫がマットの上に座っている。犬が吠えた。",
    "बिल्ली चटाई पर बैठी है और कुत्ता भौंक रहा है।",
    "고양이가 매트 위에 앉아 있고 개가 짖는다.",
    "แมวนั่งบนเสื่อ และสุนัขเห่า",
    "Ο ΣΚΎΛΟΣ ΓΑΒΓΊΖΕΙ ΣΤΗ ΓΆΤΑ. ὅλος ὁ κόσμος.",
    "Con mèo ngồi trên tấm thảm,\n\n  còn con chó thì sủa.",
    "القطة تجلس على السجادة والكلب ينبح",
    "paka ameketi juu ya mkeka na mbwa anabweka",
]


class WordPieces:
    """A stand-in for the tokenizer: runs of two characters, numbered as they come."""

    def __init__(self, fingerprint: str = "pieces") -> None:
        self.numbers: dict[str, int] = {}
        self.fingerprint = fingerprint

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.numbers.setdefault(text[i : i + 2], len(self.numbers)) for i in range(0, len(text), 2)] for text in texts]


def space(analyzer: str, dimensions: int = 6, **settings: int) -> TfidfSpace:
    return TfidfSpace.fit(TEXTS, TfidfConfig(analyzer=analyzer, dimensions=dimensions, **settings), 0, WordPieces())


def plain_char_terms(text: str) -> list[str]:
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text).lower().replace("ς", "σ"))
    return [text[i : i + n] for n in range(1, 5) for i in range(len(text) - n + 1)]


def plain_subword_terms(ids: list[int]) -> list[str]:
    return [str(a) for a in ids] + [f"{a} {b}" for a, b in zip(ids, ids[1:], strict=False)]


def cosines(vectors: np.ndarray) -> np.ndarray:
    return vectors @ vectors.T


@pytest.mark.parametrize("analyzer", ["char", "subword"])
def test_space_agrees_with_scikit_learns_vectoriser(analyzer: str) -> None:
    tokenizer = WordPieces()
    items = TEXTS if analyzer == "char" else tokenizer.encode(TEXTS)
    peer = TfidfVectorizer(analyzer=plain_char_terms if analyzer == "char" else plain_subword_terms)
    weighted = peer.fit_transform(items).toarray()
    fitted = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer=analyzer, dimensions=10), 0, tokenizer)
    assert len(fitted.codes) == len(peer.vocabulary_)
    assert np.allclose(np.sort(fitted.idf), np.sort(peer.idf_), rtol=1e-6)
    # With as many dimensions as texts nothing is lost: the geometry of the texts is that of the TF-IDF vectors.
    assert np.abs(cosines(fitted.transform(TEXTS)) - cosines(weighted)).max() < 1e-5


def test_word_space_agrees_with_the_published_vectoriser() -> None:
    peer = TfidfVectorizer()  # its default pattern is the published one
    weighted = peer.fit_transform(TEXTS).toarray()
    fitted = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer="word", dimensions=10), 0)
    assert len(fitted.codes) == len(peer.vocabulary_)
    assert np.allclose(np.sort(fitted.idf), np.sort(peer.idf_), rtol=1e-6)
    assert np.abs(cosines(fitted.transform(TEXTS)) - cosines(weighted)).max() < 1e-5


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="abZÉé_09 .-'\n\u0301İσςΣкиのあ猫कि่นุ", max_size=30))
def test_words_are_those_of_scikit_learns_analyzer(text: str) -> None:
    published = TfidfVectorizer().build_analyzer()
    assert WordAnalyzer().words(text) == [word.replace("ς", "σ") for word in published(text)]


def test_most_frequent_terms_are_kept() -> None:
    counts: dict[str, int] = {}
    for text in TEXTS:
        for term in plain_char_terms(text):
            counts[term] = counts.get(term, 0) + 1
    fitted = space("char", max_features=100)
    assert len(fitted.codes) == 100
    by_code = {int(CharAnalyzer().codes(CharAnalyzer().symbols([term])[0])[-1]): count for term, count in counts.items()}
    kept = sorted((by_code[code] for code in fitted.codes.tolist()), reverse=True)
    assert kept == sorted(counts.values(), reverse=True)[:100]


def test_counting_in_many_portions_gives_the_same_space(monkeypatch: pytest.MonkeyPatch) -> None:
    import megaxelm.cluster.space as module

    whole = space("char")
    monkeypatch.setattr(module, "_CHUNK_TERMS", 50)
    portions = space("char")
    assert (whole.codes == portions.codes).all() and (whole.idf == portions.idf).all()
    assert np.abs(whole.transform(TEXTS) - portions.transform(TEXTS)).max() < 1e-6


@pytest.mark.parametrize("analyzer", ["char", "subword", "word"])
def test_vectors_have_length_one_and_zero_without_known_terms(analyzer: str) -> None:
    fitted = space(analyzer)
    lengths = np.linalg.norm(fitted.transform([*TEXTS, "\U00012345", ""]), axis=1)
    assert np.abs(lengths[:-2] - 1).max() < 1e-6
    assert lengths[-2:].tolist() == [0, 0]
    assert fitted.vector(fitted.start()).tolist() == [0.0] * 6


def test_subword_pushed_token_by_token_equals_every_prefix() -> None:
    fitted = space("subword")
    for ids in WordPieces().encode(TEXTS):
        state = fitted.start()
        for length, token in enumerate(ids, start=1):
            fitted.push(state, token)
            assert np.abs(fitted.vector(state) - fitted.transform_tokens([ids[:length]])[0]).max() < 1e-5


def test_pushing_several_tokens_at_once_is_the_same() -> None:
    fitted = space("subword")
    one, many = fitted.start(), fitted.start()
    for token in [3, 4, 5, 6]:
        fitted.push(one, token)
    fitted.push(many, [3, 4])
    fitted.push(many, np.array([5, 6]))  # type: ignore[arg-type]
    assert (fitted.vector(one) == fitted.vector(many)).all()


# Decomposed Hangul and accents, sigma at the end of a word, marks that come late, runs of whitespace over pieces.
HARD = [
    unicodedata.normalize("NFD", "고양이가 é mèo γάτας ὅλος"),
    "ΓΑΤΑΣ ΣΚΥΛΟΣ\u3000\n ",
    " \t a\u0323\u0307b",
    "कि\u0947 क\u093c",
    "İstanbul I\u0307",
    "\u0301abc",
]


def check_every_prefix(fitted: TfidfSpace, text: str, pieces: Sequence[str]) -> None:
    state, read = fitted.start(), ""
    for piece in pieces:
        fitted.push(state, piece)
        read += piece
        assert np.abs(fitted.vector(state) - fitted.transform([read])[0]).max() < 1e-5, (text, read)


@pytest.mark.parametrize("text", TEXTS + HARD)
def test_char_pushed_character_by_character_equals_every_prefix(text: str) -> None:
    fitted = TfidfSpace.fit(TEXTS + HARD, TfidfConfig(analyzer="char", dimensions=8), 0)
    check_every_prefix(fitted, text, list(text))


@pytest.mark.parametrize("text", TEXTS + HARD)
def test_words_pushed_character_by_character_equal_every_prefix(text: str) -> None:
    fitted = TfidfSpace.fit(TEXTS + HARD, TfidfConfig(analyzer="word", dimensions=8), 0)
    check_every_prefix(fitted, text, list(text))


# Beginnings of words are terms too, so that a prefix that ends within a word has a vector of its own.
BEGINNINGS = [text[:end] for text in TEXTS + HARD for end in range(2, len(text))]
WORD_SPACE = TfidfSpace.fit(BEGINNINGS, TfidfConfig(analyzer="word", dimensions=40), 0)
HARD_SPACE = TfidfSpace.fit(TEXTS + HARD, TfidfConfig(analyzer="char", dimensions=8), 0)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet="".join(sorted(set("".join(TEXTS + HARD)))) + "\u1100\u1161\u11a8\u00a0", max_size=6), max_size=6))
def test_char_pushed_in_any_pieces_equals_the_whole(pieces: list[str]) -> None:
    check_every_prefix(HARD_SPACE, "", pieces)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet="".join(sorted(set("".join(TEXTS + HARD)))) + "_'", max_size=8), max_size=6))
def test_words_pushed_in_any_pieces_equal_the_whole(pieces: list[str]) -> None:
    check_every_prefix(WORD_SPACE, "", pieces)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet="abΣς İ\u0301猫", max_size=6), max_size=6))
def test_terms_of_pushed_words_are_those_of_the_whole(pieces: list[str]) -> None:
    analyzer, state, settled = WordAnalyzer(), TermState(), []
    for piece in pieces:
        settled += analyzer.push(state, piece)
    assert settled + analyzer.pending(state) == analyzer.symbols(["".join(pieces)])[0].tolist()


def test_the_tail_that_waits_is_short() -> None:
    fitted = space("char")
    state = fitted.start()
    for character in "".join(TEXTS) * 5:
        fitted.push(state, character)
        assert len(state.terms.tail) <= 4


def test_a_copied_state_goes_its_own_way() -> None:
    fitted = space("subword")
    state = fitted.start()
    fitted.push(state, [1, 2])
    before = fitted.vector(state)
    other = state.copy()
    fitted.push(other, [30, 31])
    assert (fitted.vector(state) == before).all() and (fitted.vector(other) != before).any()


def test_subword_codes_are_exact_for_the_largest_ids() -> None:
    codes = SubwordAnalyzer(None).codes(np.array([256007, 0, 2**31 - 2]))
    assert codes.tolist() == [256008, 1, 2**31 - 1, 256008 << 32 | 1, 1 << 32 | 2**31 - 1]


def test_an_unknown_analyzer_is_an_error_and_each_says_whether_it_reads_text() -> None:
    with pytest.raises(ClusterError, match=r"analyzer = 'words': unknown; choose subword, char or word"):
        make_analyzer("words", None)
    for name in ("subword", "char", "word"):
        assert make_analyzer(name, None).name == name
        assert make_analyzer(name, None).reads_text == reads_text(name) == (name != "subword")


@pytest.mark.parametrize("analyzer", ["char", "subword", "word"])
def test_what_is_saved_loads_the_same(analyzer: str, tmp_path: Path) -> None:
    tokenizer = WordPieces()
    fitted = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer=analyzer, dimensions=5), 0, tokenizer)
    fitted.save(tmp_path, "space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.json", "space.safetensors"]
    loaded = TfidfSpace.load(tmp_path, "space", tokenizer)
    assert (loaded.transform(TEXTS) == fitted.transform(TEXTS)).all()


def test_fit_transform_gives_the_vectors_of_transform() -> None:
    fitted, vectors = TfidfSpace.fit_transform(TEXTS, TfidfConfig(analyzer="char", dimensions=5), 0)
    assert np.abs(vectors - fitted.transform(TEXTS)).max() < 1e-6


def test_fitting_is_deterministic() -> None:
    assert (space("char").components == space("char").components).all()


def test_another_tokenizer_is_an_error_and_none_reads_ids_only(tmp_path: Path) -> None:
    space("subword").save(tmp_path, "space")
    with pytest.raises(ClusterError, match="fingerprint is other"):
        TfidfSpace.load(tmp_path, "space", WordPieces("other"))
    loaded = TfidfSpace.load(tmp_path, "space")
    assert loaded.transform_tokens([[1, 2]]).shape == (1, 6)
    with pytest.raises(ClusterError, match="need the run's tokenizer"):
        loaded.transform(["text"])


def test_text_and_ids_are_not_mixed_up() -> None:
    with pytest.raises(TypeError):
        space("subword").push(space("subword").start(), "text")
    with pytest.raises(TypeError):
        space("char").push(space("char").start(), [1, 2])
    with pytest.raises(TypeError):
        space("word").push(space("word").start(), [1, 2])
    for analyzer in ("char", "word"):
        with pytest.raises(ClusterError, match=f"analyzer = {analyzer}: this space reads text"):
            space(analyzer).transform_tokens([[1]])


@pytest.mark.parametrize("texts", [[], [""], ["", "\n"]])
def test_too_little_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(ClusterError, match="too little"):
        TfidfSpace.fit(texts, TfidfConfig(analyzer="char"), 0)


def test_damaged_files_are_cluster_errors(tmp_path: Path) -> None:
    space("char").save(tmp_path, "space")
    arrays = tmp_path / "space.safetensors"
    whole = arrays.read_bytes()
    for length in [0, 5, 8, 60, len(whole) // 2, len(whole) - 1]:
        arrays.write_bytes(whole[:length])
        with pytest.raises(ClusterError, match="space"):
            TfidfSpace.load(tmp_path, "space")
    arrays.unlink()
    with pytest.raises(ClusterError, match="space.json"):
        TfidfSpace.load(tmp_path, "space")


class Characters:
    """A stand-in for the tokenizer: one token a character."""

    fingerprint = "characters"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]


@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
@pytest.mark.parametrize("already", [0, 1, 5])
def test_vectors_of_all_prefixes_are_those_of_one_push_after_the_other(analyzer: str, already: int) -> None:
    texts = [f"the small house number {i} stands by the {i * i} river" for i in range(30)]
    space = TfidfSpace.fit(texts, TfidfConfig(analyzer=analyzer, dimensions=6), 0, Characters())
    text = "a small house stands by 25 rivers number 9"
    pieces = [ord(character) for character in text] if analyzer == "subword" else list(text)
    for length in (0, 1, 2, len(pieces)):
        state, other = space.start(), space.start()
        for piece in pieces[:already]:
            space.push(state, piece)
            space.push(other, piece)
        expected = []
        for piece in pieces[already : already + length]:
            expected.append(space.vector(state))
            space.push(state, piece)
        found = space.prefixes(other, pieces[already : already + length])
        assert found.shape == (len(expected), space.dimensions)
        np.testing.assert_allclose(found, np.array(expected).reshape(found.shape), atol=1e-6)
