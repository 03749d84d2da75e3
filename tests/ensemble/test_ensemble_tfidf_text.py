"""The tfidf router token by token: the vector of every prefix, at a cost that does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megaxelm.cluster.space import TfidfSpace
from megaxelm.ensemble.routers import NO_TOKEN, Request, RouterData, TfidfRouter, make_router
from megaxelm.recipe import TfidfConfig

# Article 1 of the Universal Declaration of Human Rights, with capitals, marks that combine, jamo, right-to-left text and no spaces.
LANGUAGES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "el": "ΟΛΟΙ οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا.",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}


class Bytes:
    """Token ids are bytes, the hardest case: most characters are spelt by several tokens. `ids_decoded` counts the work."""

    ids_decoded = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        self.ids_decoded += len(ids)
        return bytes(ids).decode("utf-8", "replace")


def text_of(languages: Sequence[str]) -> str:
    import unicodedata

    # Vietnamese with its marks apart, Korean in jamo: a character that comes later changes the one before.
    return " ".join(unicodedata.normalize("NFD" if code in ("vi", "ko") else "NFC", LANGUAGES[code]) for code in languages)


def made(analyzer: str, tokenizer: Bytes) -> tuple[TfidfSpace, TfidfRouter]:
    texts = list(LANGUAGES.values())
    space = TfidfSpace.fit(texts, TfidfConfig(analyzer=analyzer, dimensions=8), 0, tokenizer)
    centres = torch.from_numpy(space.transform(texts)[:4])
    data = RouterData(["a", "b", "c", "d"], space=space, centres=centres, temperature=1.0, decode=tokenizer.decode)
    return space, make_router("tfidf", data)  # type: ignore[return-value]


def vector_of_prefix(space: TfidfSpace, ids: Sequence[int]) -> np.ndarray:
    """By reading the whole prefix again; bytes of an unfinished character are no text yet."""
    if not space.reads_text:
        return space.transform_tokens([ids])[0]
    return space.transform([bytes(ids).decode("utf-8", "ignore")])[0]


@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
def test_every_prefix_has_the_vector_of_the_whole_prefix_read_again(analyzer: str) -> None:
    tokenizer = Bytes()
    space, router = made(analyzer, tokenizer)
    [ids] = tokenizer.encode([text_of(list(LANGUAGES))])
    prompt = len(LANGUAGES["en"].encode()) + 3
    state = router.start([Request(ids[:prompt])])
    along = router.along(Request(ids[:prompt]), ids[prompt:])
    for position in range(prompt, len(ids)):
        whole = vector_of_prefix(space, ids[:position])
        assert np.abs(router.space.vector(state[0]) - whole).max() <= 1e-5, position
        exact = router.of_vectors(torch.from_numpy(whole))
        assert (router.weights(state)[0] - exact).abs().max() <= 1e-5
        assert (along[position - prompt] - exact).abs().max() <= 1e-5
        router.update(state, torch.tensor([ids[position]]))


@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
def test_rows_that_skip_stay_where_they_are(analyzer: str) -> None:
    tokenizer = Bytes()
    space, router = made(analyzer, tokenizer)
    rows = tokenizer.encode([text_of([code]) for code in ("ru", "ko", "hi")])
    generator, read = torch.Generator().manual_seed(3), [0, 0, 0]
    state = router.start([Request()] * 3)
    for _ in range(120):
        moves = torch.rand(3, generator=generator) < 0.6
        router.update(state, torch.tensor([rows[row][read[row]] if moves[row] else NO_TOKEN for row in range(3)]))
        read = [count + int(moves[row]) for row, count in enumerate(read)]
        exact = router.of_vectors(torch.from_numpy(np.stack([vector_of_prefix(space, rows[row][: read[row]]) for row in range(3)])))
        assert (router.weights(state) - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
def test_a_token_costs_the_same_after_a_long_text(analyzer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms looked up and ids decoded, for the same 100 tokens after 10 and after 10000 others."""
    tokenizer = Bytes()
    space, router = made(analyzer, tokenizer)
    terms = 0
    add = space._add

    def counted(total: Any, codes: Sequence[int]) -> None:
        nonlocal terms
        terms += len(codes)
        add(total, codes)

    monkeypatch.setattr(space, "_add", counted)
    monkeypatch.setattr(space, "transform", None)  # nothing is read again
    filler = tokenizer.encode([text_of(["ru", "en", "hi"])])[0]
    tokens = tokenizer.encode([". " + LANGUAGES["el"]])[0][:100]
    costs = []
    for before in (filler[-10:], (filler * 40)[-10_000:]):
        state = router.start([Request(before)])
        terms = tokenizer.ids_decoded = 0
        for token in tokens:
            router.weights(state)
            router.update(state, torch.tensor([token]))
        costs.append((terms, tokenizer.ids_decoded))
    assert terms > 0 and (tokenizer.ids_decoded > 0) == space.reads_text
    assert costs[1][0] <= costs[0][0] + 10 and costs[1][1] <= costs[0][1] + 10
