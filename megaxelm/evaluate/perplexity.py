"""Held-out text and the token log-probabilities that models give it.

One document a sequence, the start token in front (given, not scored), cut at a number of tokens, no end token scored. Bits per byte
divides by the UTF-8 bytes of exactly the text whose tokens were scored, so models with other tokenizers can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from megaxelm.ensemble.scoring import document_streams
from megaxelm.ensemble.windows import Windows
from megaxelm.errors import StageError

if TYPE_CHECKING:
    from megaxelm.corpus.tokenizer import Tokenizer
    from megaxelm.model.decoder import Decoder


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents of one language as scored: `ids` without start token, `num_bytes` of each cut text."""

    language: str
    ids: list[list[int]]
    num_bytes: list[int]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(map(len, self.ids))

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return sum(self.num_bytes)


def read_held_out(folders: Mapping[str, Path], tokenizer: Tokenizer, max_documents: int, max_tokens: int) -> dict[str, HeldOut]:
    """The first `max_documents` held-out documents of each language, each cut at `max_tokens` tokens; empty ones are passed over.

    Args:
        folders: language -> the folder where its held-out text lies, as `<language>.jsonl`.

    Raises:
        StageError: a language has no held-out text.
    """
    from megaxelm.corpus.prepare import read_documents

    found = {}
    for language, folder in folders.items():
        path = folder / f"{language}.jsonl"
        documents = islice(read_documents(path), max_documents) if path.is_file() else []
        cuts = [tokenizer.cut(document.text, max_tokens) for document in documents]
        cuts = [(ids, num_bytes) for ids, num_bytes in cuts if len(ids) and num_bytes]
        if not cuts:
            raise StageError(
                f"evaluation: no held-out text for the language {language!r} (corpus/valid/{path.name} is missing or empty); "
                "raise corpus.held_out.share or give corpus.valid"
            )
        found[language] = HeldOut(language, [list(map(int, ids)) for ids, _ in cuts], [num_bytes for _, num_bytes in cuts])
    return found


def score_models(
    models: Mapping[str, Callable[[], Decoder]],
    held_out: Mapping[str, HeldOut],
    start_id: int,
    token_budget: int | None = None,
    windows: Windows | None = None,
    title: str = "evaluate",
) -> dict[str, dict[str, list[Tensor]]]:
    """Token log-probabilities of every model on every held-out document: model -> language -> documents of [tokens] fp32.

    One model is in memory at a time; a progress bar on stderr counts documents.

    Args:
        windows: how documents are read that are longer than a model's positions; None: that is an error.
    """
    languages = list(held_out)
    documents = [ids for language in languages for ids in held_out[language].ids]
    found: dict[str, dict[str, list[Tensor]]] = {}
    with tqdm(total=len(models) * len(documents), desc=title, unit="doc", file=sys.stderr, mininterval=0.5) as bar:
        for name, load in models.items():
            bar.set_postfix_str(name, refresh=False)
            streams = iter(document_streams(load(), documents, start_id, token_budget, on_batch=bar.update, windows=windows))
            found[name] = {language: [next(streams) for _ in held_out[language].ids] for language in languages}
    return found
