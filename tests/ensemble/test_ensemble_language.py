"""The language router where no language is given: it is read off the prompt."""

from __future__ import annotations

import sys

import pytest
import torch

from megaxelm.ensemble.routers import LanguageRouter, PromptDetector, Request, RouterData, make_router
from megaxelm.errors import RoutingError

PROMPTS = {
    "de": "Die Seite wurde erfolgreich gespeichert und kann jetzt bearbeitet werden.",
    "en": "The page was saved and can be edited now.",
    "ru": "Страница успешно сохранена, теперь её можно редактировать.",
    "el": "Η σελίδα αποθηκεύτηκε και μπορεί τώρα να τροποποιηθεί.",
}
EXPERTS = {"de": "west", "en": "west", "ru": "east", "el": "south"}


def ids(text: str) -> list[int]:
    return list(text.encode())


def decode(token_ids: list[int]) -> str:
    return bytes(token_ids).decode("utf-8", "replace")


def router(**changes: object) -> LanguageRouter:
    data = RouterData(["west", "east", "south"], language_expert=EXPERTS, decode=decode)
    return make_router("language", data, **changes)  # type: ignore[return-value]


def test_the_prompt_decides_where_no_language_is_given_and_the_state_tells() -> None:
    made = router()
    requests = [*(Request(ids(text)) for text in PROMPTS.values()), Request(ids(PROMPTS["ru"]), "de")]
    state = made.start(requests)
    assert made.detected(state) == ["de", "en", "ru", "el", None]
    assert made.weights(state).argmax(-1).tolist() == [0, 0, 1, 2, 0]
    assert made.detected(made.select(state, [3, 4])) == ["el", None]
    assert made.detected(made.join(made.select(state, [2]), made.start([Request((), "de")]))) == ["ru", None]
    assert torch.equal(made.along(requests[2], [1, 2]), made.weights(state)[2].expand(2, -1))


def test_only_languages_of_the_ensemble_are_answers() -> None:
    """Ukrainian is none of them, so the nearest is taken."""
    ukrainian = ids("Сторінку успішно збережено, тепер її можна редагувати.")
    made = router()
    assert made.detected(made.start([Request(ukrainian)])) == ["ru"]


def test_with_a_fallback_a_language_that_no_expert_holds_goes_there() -> None:
    made = router(experts=["west", "east", "south", "seed"], fallback="seed")
    requests = [Request(ids("Ang pahina ay matagumpay na na-save at maaari na itong i-edit ngayon.")), Request(ids(PROMPTS["de"]))]
    state = made.start([*requests, Request((), "xx"), Request(), Request(ids("123 456"))])
    assert made.weights(state).argmax(-1).tolist() == [3, 0, 3, 3, 3]
    detected = made.detected(state)
    assert detected[0] not in (None, *EXPERTS) and detected[1:] == ["de", None, None, None]


@pytest.mark.parametrize(
    ("prompt", "changes", "text"),
    [
        ("", {}, "the prompt is empty.*give one, or take another router.*de, el, en, ru"),
        ("12 + 34 = ?", {}, "no letters to tell its language by.*give one"),
        (PROMPTS["de"], {"detect_language": False}, "a text has no language; give one"),
        (PROMPTS["de"], {"language_expert": {"xq": "west"}}, "the detector knows none of xq; give the language"),
    ],
)
def test_what_cannot_be_told_is_an_error_that_names_the_way_out(prompt: str, changes: dict, text: str) -> None:
    with pytest.raises(RoutingError, match=text):
        router(**changes).start([Request(ids(prompt))])


def test_a_language_that_the_detector_does_not_know_may_be_given() -> None:
    made = router(language_expert={"xq": "east", "de": "west"})
    state = made.start([Request((), "xq"), Request(ids(PROMPTS["en"]))])
    assert made.weights(state).argmax(-1).tolist() == [1, 0]


def test_the_detector_is_read_only_when_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    detector = PromptDetector(decode, ["de"])
    made = LanguageRouter(["a"], {"de": "a"}, detector)
    made.start([Request(ids("Haus"), "de")])
    with pytest.raises(ImportError):
        made.start([Request(ids("Haus"))])
