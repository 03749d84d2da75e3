"""Text to fit on: documents of the corpus' sample, which is training text and not what is evaluated, each with the expert that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaxelm.errors import MergeError
from megaxelm.merge.material import Material

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document


@dataclass(frozen=True)
class SampleText:
    """A document cut to some tokens: `ids` without start token; `expert`: number of the expert whose cluster holds it."""

    ids: list[int]
    language: str
    expert: int


def sample_texts(material: Material, max_tokens: int, length: int, language: str | None = None) -> list[SampleText]:
    """Documents of the sample, a language after the other in turn, until there are `max_tokens` tokens, each cut at `length` tokens.

    Args:
        language: of this language alone.

    Raises:
        MergeError: no text of the language, or an expert that no document of the sample belongs to.
    """
    waiting = _by_language(material, language)
    found: list[tuple[Document, list[int]]] = []
    tokenizer, tokens = material.ensemble.tokenizer, 0
    while waiting and tokens < max_tokens:
        for code in list(waiting):
            document = next(waiting[code], None)
            if document is None:
                del waiting[code]
                continue
            ids = list(map(int, tokenizer.cut(document.text, min(length, max_tokens - tokens))[0])) if tokens < max_tokens else []
            if ids:
                found.append((document, ids))
                tokens += len(ids)
    experts = _experts_of(material, [document for document, _ in found])
    return [SampleText(ids, document.language, expert) for (document, ids), expert in zip(found, experts, strict=True)]


def refuse_without_text(material: Material, texts: list[SampleText]) -> None:
    """Raise a MergeError that names the experts of which there is no text among `texts`."""
    present = {text.expert for text in texts}
    missing = [name for number, name in enumerate(material.names) if number not in present]
    if missing:
        raise MergeError(
            f"the sample has no document of {', '.join(missing)}, so nothing can be fitted for them: raise --sample-tokens, or "
            "corpus.sample_bytes in the recipe"
        )


def _by_language(material: Material, language: str | None) -> dict[str, Iterator[Document]]:
    """The documents of each language; those of a grown expert's own languages lie in the expert's run."""
    from megaxelm.corpus.prepare import read_documents

    files: dict[str, Path] = {}
    folders = [material.run.folder("corpus"), *(material.run.path / "grown" / name / "corpus" for name in material.names)]
    for folder in folders:
        for path in sorted((folder / "sample").glob("*.jsonl")):
            files.setdefault(path.stem, path)
    if language is not None and language not in files:
        raise MergeError(f"no text of the language {language!r} in the sample; there are {', '.join(sorted(files)) or 'none'}")
    return {code: read_documents(path) for code, path in sorted(files.items()) if language in (None, code)}


def _experts_of(material: Material, documents: list[Document]) -> list[int]:
    """The expert of each document: by its language where clusters are sets of languages, else by the clusters' own assignment."""
    from megaxelm.cluster.load import load_partitioner

    ensemble = material.ensemble
    partitioner = load_partitioner(material.run.folder("clusters"), ensemble.tokenizer)
    by_language = partitioner.languages() is not None
    known = [list(partitioner.names)[number] for number in partitioner.assign(documents)] if not by_language else []
    found = []
    for place, document in enumerate(documents):
        name = ensemble.data.language_expert.get(document.language) if by_language else known[place]
        if name not in material.names:
            raise MergeError(f"no expert of the ensemble holds the language {document.language!r}; make the ensemble again")
        found.append(material.names.index(name))
    return found
