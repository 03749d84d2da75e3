"""Further sets of texts that are scored like the held-out text (`evaluation.texts`), parallel ones above all.

Parallel texts say the same in every language, so languages can be compared by the bits of the whole set: a byte does not hold as much in
one script as in another. Nothing is cut here: a text longer than the evaluation's window is read in windows.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaxelm.ensemble.text_scores import read_texts
from megaxelm.errors import CorpusError, StageError
from megaxelm.evaluate.documents import DocumentScores, language_scores
from megaxelm.evaluate.perplexity import HeldOut
from megaxelm.evaluate.routing import OWN
from megaxelm.evaluate.subjects import BASELINES
from megaxelm.files import hash_file

if TYPE_CHECKING:
    from megaxelm.corpus.tokenizer import Tokenizer

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def text_files(name: str, patterns: Sequence[str]) -> dict[str, Path]:
    """Language -> file of a set of texts; the language is the file's name before `.jsonl`.

    Raises:
        StageError: a pattern that fits no file, a file of another kind, or two of one language.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
        if not paths:
            raise StageError(f"evaluation.texts.{name} = {pattern}: no such file; give files <language>.jsonl, or a pattern of them")
        for path in paths:
            ending = next((ending for ending in sorted(_ENDINGS, key=len, reverse=True) if path.name.endswith(ending)), None)
            if ending is None:
                raise StageError(f"evaluation.texts.{name}: {path}: its name must be <language>.jsonl, .jsonl.gz or .jsonl.zst")
            language = path.name.removesuffix(ending)
            if language in found:
                raise StageError(f"evaluation.texts.{name}: {found[language]} and {path} are both of the language {language!r}; drop one")
            found[language] = path
    return dict(sorted(found.items()))


def text_sources(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Name and hash of every file of every set: what the evaluation is made from."""
    return {f"{name}/{path.name}": hash_file(path) for name, patterns in texts.items() for path in text_files(name, patterns).values()}


def read_text_set(name: str, patterns: Sequence[str], tokenizer: Tokenizer, languages: Sequence[str]) -> dict[str, HeldOut]:
    """The texts of a set in the languages that are evaluated, whole; files of other languages are named on the console and passed over.

    Raises:
        StageError: no file is of an evaluated language, or one has no text. CorpusError: a line is no text.
    """
    files = text_files(name, patterns)
    others = [language for language in files if language not in languages]
    if others:
        print(f"evaluation.texts.{name}: {', '.join(others)}: not among the run's languages, passed over", flush=True)
    found = {}
    for language, path in files.items():
        if language in others:
            continue
        try:
            texts = [each.text for each in read_texts(path) if each.text.strip()]
        except CorpusError as error:
            raise CorpusError(f"evaluation.texts.{name}: {str(error).removeprefix('--file ')}") from None
        if not texts:
            raise StageError(f"evaluation.texts.{name}: {path} has no text; fill it or leave it out")
        found[language] = HeldOut(language, tokenizer.encode(texts), [len(text.encode("utf-8")) for text in texts])
    if not found:
        raise StageError(
            f"evaluation.texts.{name}: no file of a language of this run; it has {', '.join(languages)}, and a file is <language>.jsonl"
        )
    return found


def text_set_results(documents: DocumentScores, labels: Mapping[str, str], own: Mapping[str, str]) -> dict[str, Any]:
    """A set's entry in `results.json`: bits of the whole set, per text and per byte, of every model in every language.

    Args:
        labels: model in `documents` -> name for people. own: language -> key of its own expert.
    """
    parallel = len({len(sizes) for sizes in documents.num_bytes.values()}) == 1
    models: dict[str, Any] = {}
    for key, label in labels.items():
        if key not in BASELINES and OWN not in models:
            models[OWN] = {"label": "own expert", "languages": _entries(documents, own)}
        models[key] = {"label": label, "languages": _entries(documents, {language: key for language in documents.languages})}
    for model in models.values():
        rows = model["languages"].values()
        model["mean_bits_per_byte"] = math.fsum(row["bits_per_byte"] for row in rows) / len(rows)
    return {
        "languages": [
            {"code": code, "texts": len(sizes), "bytes": int(sizes.sum()), "tokens": int(documents.num_tokens[code].sum())}
            for code, sizes in documents.num_bytes.items()
        ],
        "same_number_of_texts": parallel,
        "models": models,
    }


def _entries(documents: DocumentScores, model_of: Mapping[str, str]) -> dict[str, dict[str, float]]:
    found = {}
    for language in documents.languages:
        key = model_of[language]
        score = language_scores(documents, key)[language]
        nats = documents.nats[key][language]
        found[language] = {
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "bits": math.fsum(nats) / math.log(2),
            "bits_per_text": math.fsum(nats) / math.log(2) / len(nats),
        }
    return found
