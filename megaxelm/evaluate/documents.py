"""Nats of every model on every held-out document: `evaluation/documents.npz`.

This is what intervals and paired differences are made from, so that no model has to read the text again for them.

Keys of models: `seed`, `dense`, `expert:<name>`, `mixture:<router>` (with the ensemble's own top_m), `mixture:<router>@<m>`,
`merged:<rung>`, `lapt:<name>`.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from megaxelm.errors import StageError
from megaxelm.evaluate.perplexity import HeldOut

_NATS, _BYTES, _TOKENS = "nats", "num_bytes", "num_tokens"
_SEPARATOR = "|"
"""Between the parts of an array's name in the file. The last part is the language, so a model's key may hold it."""


@dataclass
class DocumentScores:
    """What every model makes of every held-out document, in the order in which the documents lie in the corpus.

    `nats`: negative log-likelihood, model -> language -> float64 [documents]. `num_bytes`, `num_tokens`: of the scored text of each
    document, language -> int64 [documents]. A model may lack languages.
    """

    nats: dict[str, dict[str, np.ndarray]]
    num_bytes: dict[str, np.ndarray]
    num_tokens: dict[str, np.ndarray]

    @property
    def languages(self) -> list[str]:
        """Languages of which documents are known."""
        return list(self.num_bytes)

    def save(self, path: Path) -> None:
        """Write a compressed `.npz`."""
        arrays: dict[str, np.ndarray] = {}
        for model, found in self.nats.items():
            for language, nats in found.items():
                arrays[_SEPARATOR.join((_NATS, model, language))] = nats
        for kind, sizes in ((_BYTES, self.num_bytes), (_TOKENS, self.num_tokens)):
            arrays |= {f"{kind}{_SEPARATOR}{language}": values for language, values in sizes.items()}
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> DocumentScores:
        """Read what `save` wrote.

        Raises:
            StageError: the file is missing or damaged, or its arrays do not fit together.
        """
        found = cls({}, {}, {})
        for name, values in read_arrays(path).items():
            kind, _, rest = name.partition(_SEPARATOR)
            model, _, language = rest.rpartition(_SEPARATOR)
            if kind == _NATS:
                found.nats.setdefault(model, {})[language] = values
            elif kind == _BYTES:
                found.num_bytes[language] = values
            elif kind == _TOKENS:
                found.num_tokens[language] = values
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        for language in {*self.num_bytes, *self.num_tokens, *(code for rows in self.nats.values() for code in rows)}:
            columns = [self.num_bytes.get(language), self.num_tokens.get(language)]
            columns += [rows[language] for rows in self.nats.values() if language in rows]
            if len({None if column is None else column.shape for column in columns}) != 1:
                raise StageError(f"{path}: damaged (the documents of {language!r} differ in number from array to array); {_WAY_OUT}")


_WAY_OUT = "make it again: megaxelm run RECIPE --from evaluation"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a `.npz` of the stage `evaluation`.

    Raises:
        StageError: it is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; the run was evaluated before it was kept, {_WAY_OUT}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StageError(f"{path}: damaged ({error}); {_WAY_OUT}") from None


def document_scores(held_out: Mapping[str, HeldOut], streams: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> DocumentScores:
    """Scores of documents from token log-probabilities: model -> language -> documents of [tokens].

    Raises:
        StageError: a log-probability is not finite, so the model is broken.
    """
    nats = {model: {language: document_nats(model, language, rows) for language, rows in found.items()} for model, found in streams.items()}
    num_bytes = {language: np.array(item.num_bytes, dtype=np.int64) for language, item in held_out.items()}
    num_tokens = {language: np.array([len(ids) for ids in item.ids], dtype=np.int64) for language, item in held_out.items()}
    return DocumentScores(nats, num_bytes, num_tokens)


def document_nats(model: str, language: str, streams: Iterable[Tensor]) -> np.ndarray:
    """Negative log-likelihood float64 [documents] from the token log-probabilities [tokens] of each.

    Raises:
        StageError: one is not finite, so the model is broken.
    """
    nats = np.array([-float(stream.double().sum()) for stream in streams], dtype=np.float64)
    if not np.isfinite(nats).all():
        raise StageError(
            f"evaluation: `{model}` gives a document of {language!r} a negative log-likelihood of "
            f"{nats[~np.isfinite(nats)][0]}; its weights are broken, train it again"
        )
    return nats


@dataclass(frozen=True)
class Score:
    """How well a model predicts a language: lower is better in both."""

    bits_per_byte: float
    perplexity: float  # per token


def language_scores(documents: DocumentScores, model: str) -> dict[str, Score]:
    """Bits per byte and perplexity of a model by language, over all documents of the language taken together."""
    found = {}
    for language, nats in documents.nats[model].items():
        total = math.fsum(nats)
        tokens = int(documents.num_tokens[language].sum())
        found[language] = Score(total / math.log(2) / int(documents.num_bytes[language].sum()), math.exp(min(total / tokens, 700.0)))
    return found
