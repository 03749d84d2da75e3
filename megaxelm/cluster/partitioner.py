"""What a partitioner is, and how one is written to disk and read back.

A partitioner divides documents into named clusters, one expert each. It is kept as `partitioner.json`, and
`partitioner.safetensors` where it has arrays; never as a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document

SETTINGS_FILE = "partitioner.json"
ARRAYS_FILE = "partitioner.safetensors"
RESERVED_NAMES = ("seed", "dense")
"""Names of experts that are no cluster's."""
LONGEST_NAME = 60
"""Characters of a cluster's name; a folder is named after it."""


class TextEncoder(Protocol):
    """What clustering needs of a tokenizer: token ids without special tokens."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...


class Partitioner(ABC):
    """Divides documents into named clusters."""

    kind: ClassVar[str]
    """Name of the class of partitioner in recipes and in `partitioner.json`."""
    names: list[str]
    """Names of the clusters in the order of their numbers; safe as file names. Empty before `fit`."""

    def __init__(self) -> None:
        self.names = []

    @abstractmethod
    def fit(self, documents: Iterable[Document]) -> None:
        """Find the clusters from a sample of the corpus.

        Raises:
            ClusterError: if the documents cannot be divided as asked.
        """

    @abstractmethod
    def assign(self, documents: Sequence[Document]) -> NDArray[np.int64]:
        """Number of the cluster of each document, [documents], an index into `names`.

        Raises:
            ClusterError: if a document belongs to no cluster.
        """

    @abstractmethod
    def languages(self) -> dict[str, list[str]] | None:
        """Languages of each cluster by its name, or None where clusters are not sets of languages."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """How the clusters came about, as plain values that go into JSON. Always has `method`."""

    def notes(self) -> list[str]:
        """Sentences that the user should read: what was chosen for them, and what is weaker than it looks."""
        return []

    def save(self, folder: Path) -> None:
        """Write `partitioner.json`, and `partitioner.safetensors` where there are arrays, into an existing folder."""
        settings, arrays = self._state()
        write_state(folder / SETTINGS_FILE, folder / ARRAYS_FILE, {"kind": self.kind, "names": self.names, **settings}, arrays)

    @abstractmethod
    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What `save` keeps besides kind and names: plain values, and arrays by name."""

    @classmethod
    @abstractmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> Partitioner:
        """The inverse of `_state`. May raise KeyError, TypeError or ValueError where the state is damaged."""


def load_partitioner(folder: Path | str, tokenizer: TextEncoder | None = None) -> Partitioner:
    """Read a partitioner that `Partitioner.save` wrote.

    `tokenizer` is needed to assign documents with a TF-IDF partitioner over subwords, and by no other.

    Raises:
        ClusterError: if files are missing or damaged, or the tokenizer is not the one the partitioner was fitted with.
    """
    from megaxelm.cluster.language import LanguagePartitioner
    from megaxelm.cluster.tfidf import TfidfPartitioner
    from megaxelm.cluster.typology import TypologyPartitioner

    folder = Path(folder)
    path = folder / SETTINGS_FILE
    kinds: dict[str, type[Partitioner]] = {kind.kind: kind for kind in (LanguagePartitioner, TfidfPartitioner, TypologyPartitioner)}
    settings, arrays = read_state(path, folder / ARRAYS_FILE)
    with damaged_is_an_error(path):
        kind = kinds.get(entry(settings, "kind", str))
        if kind is None:
            raise ValueError(f"kind = {settings['kind']!r} is none of {', '.join(sorted(kinds))}")
        names = settings["names"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("names is not a list of names")
        partitioner = kind._from_state(settings, arrays, tokenizer)
        partitioner.names = names
        groups = partitioner.languages()
        if groups is not None and list(groups) != names:
            raise ValueError("names and languages do not agree")
    return partitioner


def cluster_name(languages: Iterable[str]) -> str:
    """Name of a cluster of languages: the codes, sorted, joined by `-`.

    A name beyond `LONGEST_NAME` characters keeps its first codes, the number of the others, and a hash of them all.

    Raises:
        ClusterError: if the name would be `seed` or `dense`, or has a character that is not safe in a file name.
    """
    codes = sorted(languages)
    for code in codes:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", code):
            raise ClusterError(f"language {code!r}: a code may hold letters, digits, - and _ only, since a folder is named after it")
    name = "-".join(codes)
    if name in RESERVED_NAMES:
        raise ClusterError(f"language {name!r}: a cluster may not be named like the {name} model; give the language another code")
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    kept = len(codes)
    while True:
        kept -= 1
        name = "-".join([*codes[:kept], f"{len(codes) - kept}more", digest])
        if len(name) <= LONGEST_NAME or kept == 0:
            return name


def unique_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """`cluster_name` of each group of languages, checked to be unique where letter case does not count.

    Raises:
        ClusterError: if two groups would share a name.
    """
    names: dict[str, str] = {}
    for group in groups:
        name = cluster_name(group)
        if name.lower() in names:
            raise ClusterError(f"two clusters would be named {name} and {names[name.lower()]}: give their languages codes that differ more")
        names[name.lower()] = name
    return list(names.values())


def languages_of(documents: Iterable[Document]) -> list[str]:
    """Codes that occur in the documents, sorted.

    Raises:
        ClusterError: if there is no document.
    """
    codes = sorted({document.language for document in documents})
    if not codes:
        raise ClusterError("clusters: there is no document to divide; look at the corpus stage, its sample is empty")
    return codes


def assign_by_language(documents: Sequence[Document], groups: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
    """Cluster number of each document by its language; `groups` maps cluster names, in order, to languages.

    Raises:
        ClusterError: for a document in a language of no cluster.
    """
    number = {code: index for index, codes in enumerate(groups.values()) for code in codes}
    try:
        return np.array([number[document.language] for document in documents], dtype=np.int64)
    except KeyError as error:
        raise ClusterError(
            f"language {error.args[0]!r} belongs to no cluster; the clusters hold {', '.join(sorted(number))}. "
            "Leave the language out (corpus.languages) or make the clusters again with it"
        ) from None


def write_state(settings_path: Path, arrays_path: Path, settings: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Plain values as JSON, arrays (if any) as safetensors."""
    from safetensors.numpy import save_file

    settings_path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if arrays:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, arrays_path)


def read_state(settings_path: Path, arrays_path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What `write_state` wrote; no arrays where the file is absent.

    Raises:
        ClusterError: if a file is missing or damaged.
    """
    from safetensors.numpy import load_file

    if not settings_path.is_file():
        raise ClusterError(f"{settings_path}: no such file; the stage `clusters` makes it")
    with damaged_is_an_error(settings_path):
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    if not arrays_path.exists():
        return settings, {}
    with damaged_is_an_error(arrays_path):
        return settings, load_file(arrays_path)


def entry(settings: Mapping[str, Any], key: str, *types: type) -> Any:
    """`settings[key]`, which must be of one of `types`; TypeError where it is not, KeyError where it is missing."""
    value = settings[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{key} = {value!r} is no {' or '.join(kind.__name__ for kind in types)}")
    return value


def language_groups(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The entry `languages`: cluster names to lists of codes."""
    groups = entry(settings, "languages", dict)
    for codes in groups.values():
        if not isinstance(codes, list) or not codes or not all(isinstance(code, str) for code in codes):
            raise TypeError(f"languages: {codes!r} is no list of codes")
    return groups


@contextmanager
def damaged_is_an_error(path: Path) -> Iterator[None]:
    """Turns what a damaged file raises into a ClusterError that names the file and the way out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        what = f"missing entry {error}" if isinstance(error, KeyError) else str(error)
        raise ClusterError(f"{path}: damaged ({what}); make the stage that wrote it again, e.g. with --from clusters") from None
