"""How well a mixture predicts texts: log-likelihood, perplexity, bits per byte.

The start token is given and not scored, no end token is scored, and bytes are the UTF-8 bytes of the whole text, all of which is scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaxelm.ensemble.choice import choose_combine, choose_router
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import Router
from megaxelm.ensemble.scoring import weighted_scores
from megaxelm.ensemble.windows import Windows
from megaxelm.errors import CorpusError, RoutingError


@dataclass(frozen=True)
class Text:
    """A text to score. `name` says where it came from."""

    text: str
    language: str | None = None
    name: str = ""


@dataclass(frozen=True)
class TextScore:
    """`log_likelihood` in nats of `tokens` scored tokens, which spell `bytes` bytes of UTF-8.

    `weights`: of each expert, mean over tokens.
    """

    name: str
    language: str | None
    log_likelihood: float
    tokens: int
    bytes: int
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """Per token; None for an empty text."""
        return math.exp(min(-self.log_likelihood / self.tokens, 700.0)) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log2-likelihood over bytes; None for an empty text."""
        return -self.log_likelihood / math.log(2) / self.bytes if self.bytes else None

    def to_json(self) -> dict[str, Any]:
        """Everything, with the figures that follow from it."""
        return {
            "name": self.name,
            "language": self.language,
            "log_likelihood": self.log_likelihood,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "weights": self.weights,
        }


def score_texts(
    ensemble: Ensemble,
    texts: Sequence[Text],
    router: Router | str | None = None,
    top_m: int | None = None,
    expert: str | None = None,
    combine: str | None = None,
    windows: Windows | None = None,
    token_budget: int | None = None,
    progress: bool = False,
) -> list[TextScore]:
    """Score each text under the mixture, one expert in memory at a time (`combine = logit_mean`: all that have weight).

    Args:
        router, top_m, combine: None takes the ensemble's own. expert: this one alone, instead of a router.
        windows: how texts longer than the experts' positions are read; None: windows of all positions, of which half is context.
        token_budget: tokens that an expert reads in one batch. progress: a bar on stderr.

    Raises:
        RoutingError: a value out of range, an unknown expert, router or language, or a score that is not a number.
    """
    chosen, top_m = choose_router(ensemble, router, top_m, expert)
    combine = choose_combine(ensemble, combine)
    documents = ensemble.tokenizer.encode([text.text for text in texts])
    languages = [text.language for text in texts]
    decoders: list[Callable[[], Any]] = ensemble.decoders if combine != "mixture" else ensemble.passing_decoders
    found = weighted_scores(
        decoders,
        documents,
        ensemble.tokenizer.start_id,
        chosen,
        languages,
        top_m,
        token_budget,
        windows or Windows(),
        combine,
        progress,
    )
    scores = []
    for text, (logprob, log_w) in zip(texts, found, strict=True):
        total = math.fsum(logprob.tolist())
        if not math.isfinite(total):
            raise RoutingError(
                f"{text.name or 'a text'}: its log-likelihood is {total}; the weights of an expert are broken, train it again"
            )
        weights = log_w.exp().mean(0).tolist() if len(log_w) else []
        mean = dict(zip(ensemble.experts, weights, strict=False))
        scores.append(TextScore(text.name, text.language, total, len(logprob), len(text.text.encode("utf-8")), mean))
    return scores


def scoring_settings(
    ensemble: Ensemble,
    router: str | None = None,
    top_m: int | None = None,
    expert: str | None = None,
    combine: str | None = None,
    windows: Windows | None = None,
) -> dict[str, Any]:
    """What `score_texts` will take for these arguments, to be printed and kept with the scores.

    Raises:
        RoutingError: as `score_texts`.
    """
    chosen, top_m = choose_router(ensemble, router, top_m, expert)
    windows = windows or Windows()
    return {
        "experts": ensemble.experts,
        "router": None if expert else chosen.name,
        "expert": expert,
        "top_m": top_m,
        "combine": choose_combine(ensemble, combine),
        "window": windows.size or "the experts' positions",
        "min_context": windows.min_context or "half of the window",
    }


def total_score(scores: Iterable[TextScore]) -> TextScore:
    """All texts as one: sums of nats, tokens and bytes; weights over all tokens."""
    scores = list(scores)
    tokens = sum(score.tokens for score in scores)
    names = next((list(score.weights) for score in scores if score.weights), [])
    weights = {name: math.fsum(score.weights[name] * score.tokens for score in scores if score.weights) / tokens for name in names}
    log_likelihood = math.fsum(score.log_likelihood for score in scores)
    return TextScore("total", None, log_likelihood, tokens, sum(score.bytes for score in scores), weights)


def read_texts(path: Path, language: str | None = None) -> list[Text]:
    """Texts of a file: each line of a `.jsonl` (also .gz, .zst) with its `text` and, if it has one, `language`; else the file is one text.

    Args:
        language: of every text; None: what each line says.

    Raises:
        CorpusError: the file is missing, not UTF-8, or a line is no document.
    """
    from megaxelm.corpus.inputs import chunks, lines

    if not path.is_file():
        raise CorpusError(f"--file {path}: no such file")
    name = path.name.lower()
    if not name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson")):
        try:
            return [Text(b"".join(chunks(str(path))).decode("utf-8"), language, path.name)]
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    found = []
    for number, (_, line) in enumerate(lines(str(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            text, said = row["text"], row.get("language")
            text.encode("utf-8")
            if said is not None and not isinstance(said, str):
                raise TypeError(f"language = {said!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(
                f'{path}: line {number}: no text ({type(error).__name__}: {error}); a line is {{"text": "...", "language": "..."}}'
            ) from None
        found.append(Text(text, language or said, f"{path.name}:{number}"))
    return found


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
