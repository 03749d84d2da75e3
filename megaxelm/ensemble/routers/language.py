"""The router `language`: all weight on the expert that holds the language, which is given or read off the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaxelm.ensemble.routers.base import ConstantRouter, Request
from megaxelm.ensemble.routers.rows import join_rows, select_rows
from megaxelm.errors import MegaxelmError, RoutingError

Detect = Callable[[Sequence[int]], str | None]
"""Language of the text of token ids; None where it cannot be told."""


@dataclass
class LanguageState:
    """The weights of each row, and the language that was detected for it (None where it was given)."""

    log_w: Tensor  # [batch, experts]
    detected: list[str | None]

    def __len__(self) -> int:
        return len(self.detected)


class LanguageRouter(ConstantRouter):
    """All weight on the expert of the request's language.

    A request without a language has it detected from its prompt. With a fallback expert this one takes all weight where no expert holds
    the language, or none can be told.

    Args:
        experts: names of the trained experts in the ensemble's order.
        language_expert: language code -> expert name: the cluster that holds the language, or, where clusters are not sets of
            languages, the one with most of its training tokens.
        detect: reads the language off a prompt; None: it must be given.
        fallback: whether a fallback expert stands behind the trained ones.
    """

    name = "language"

    def __init__(
        self, experts: Sequence[str], language_expert: Mapping[str, str], detect: Detect | None = None, fallback: bool = False
    ) -> None:
        self.num_experts = len(experts) + fallback
        self.fallback = len(experts) if fallback else None
        self.language_expert = dict(language_expert)
        self._detect = detect
        self._index = {name: index for index, name in enumerate(experts)}
        unknown = sorted(set(self.language_expert.values()) - set(experts))
        if unknown:
            raise RoutingError(f"router.json: languages point to experts that are not in the ensemble: {', '.join(unknown)}")

    def start(self, batch: Sequence[Request]) -> LanguageState:
        log_w = torch.full((len(batch), self.num_experts), -torch.inf, dtype=torch.float64)
        found = [self._language(request) if request.language is None else None for request in batch]
        for row, request in enumerate(batch):
            log_w[row, self._expert(found[row] if request.language is None else request.language)] = 0.0
        return LanguageState(log_w, found)

    def _language(self, request: Request) -> str | None:
        """The language of a request that names none."""
        language = self._detect(request.prompt_ids) if self._detect else None
        if language is None and self.fallback is None:
            if self._detect is None:
                why = "a text has no language"
            else:
                why = "the prompt is empty" if not len(request.prompt_ids) else "the prompt has no letters to tell its language by"
                why += " and has no language"
            raise RoutingError(f"router language: {why}; give one, or take another router. {self._known()}")
        return language

    def _expert(self, language: str | None) -> int:
        if language in self.language_expert:
            return self._index[self.language_expert[language]]
        if self.fallback is None:
            raise RoutingError(f"router language: no expert for the language {language!r}; {self._known()}; or take another router")
        return self.fallback

    def _known(self) -> str:
        return f"languages known here: {', '.join(sorted(self.language_expert)) or 'none'}"

    def weights(self, state: LanguageState) -> Tensor:
        return state.log_w

    def detected(self, state: LanguageState) -> list[str | None]:
        return list(state.detected)

    def join(self, first: LanguageState, second: LanguageState) -> LanguageState:
        return LanguageState(join_rows(first.log_w, second.log_w), join_rows(first.detected, second.detected))

    def select(self, state: LanguageState, rows: Sequence[int]) -> LanguageState:
        return LanguageState(select_rows(state.log_w, rows), select_rows(state.detected, rows))


class PromptDetector:
    """Tells the language of a prompt by its text (py3langid, read when it is first wanted).

    Args:
        decode: token ids to text.
        languages: those of the ensemble.
        among_all: answer with any language that the model knows, and not only with one of `languages`. So a text that no expert holds can
            be told from the others, at the price of more mistakes on short prompts.
    """

    def __init__(self, decode: Callable[[list[int]], str], languages: Sequence[str], among_all: bool = False) -> None:
        self._decode, self._languages, self._among_all = decode, list(languages), among_all
        self._classify: Callable[[str], str] | None = None

    def __call__(self, prompt_ids: Sequence[int]) -> str | None:
        """Code of the most likely language, or None where the prompt has no letters.

        Raises:
            RoutingError: the model knows none of the ensemble's languages.
        """
        text = self._decode(list(prompt_ids)) if len(prompt_ids) else ""
        if not any(character.isalpha() for character in text):
            return None
        if self._classify is None:
            from megaxelm.corpus.detect import Detector

            try:
                # The languages that the model does not know must be given by the caller.
                self._classify = Detector(None if self._among_all else self._languages, given=self._languages).detect
            except MegaxelmError:
                raise RoutingError(
                    f"router language: the detector knows none of {', '.join(self._languages)}; give the language of each text"
                ) from None
        return self._classify(text)
