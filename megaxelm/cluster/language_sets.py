"""Clusters that are sets of languages: their names, and which of them a document belongs to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.state import entry
from megaxelm.errors import ClusterError

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document, TokenDocument

RESERVED_NAMES = ("seed", "dense")
"""Names of experts that are no cluster's."""
LONGEST_NAME = 60
"""Characters of a cluster's name; a folder is named after it."""
_SAFE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"


def check_name(name: str, what: str) -> None:
    """Raise a ClusterError where no folder and no expert can be named `name`; `what` says in the text what it is the name of."""
    if not re.fullmatch(_SAFE_NAME, name):
        raise ClusterError(f"{what} {name!r}: a name may hold letters (a-z), digits, - and _ only, since a folder is named after it")
    if name.lower() in RESERVED_NAMES:
        raise ClusterError(f"{what} {name!r}: the {name.lower()} model is named so; choose another name")
    if len(name) > LONGEST_NAME:
        raise ClusterError(f"{what} {name!r}: {len(name)} characters; a folder is named after it, choose at most {LONGEST_NAME}")


def numbered_names(k: int) -> list[str]:
    """Names of clusters that are no sets of languages: `c00`, `c01`, ..., with as many digits as k needs."""
    return [f"c{number:0{max(2, len(str(k - 1)))}d}" for number in range(k)]


def cluster_name(languages: Iterable[str]) -> str:
    """Name of a cluster of languages: the codes, sorted, joined by `-`.

    A name beyond `LONGEST_NAME` characters keeps its first codes, the number of the others, and a hash of them all.

    Raises:
        ClusterError: if the name would be `seed` or `dense`, or has a character that is not safe in a file name.
    """
    codes = sorted(languages)
    for code in codes:
        if not re.fullmatch(_SAFE_NAME, code):
            raise ClusterError(f"language {code!r}: a code may hold letters, digits, - and _ only, since a folder is named after it")
    name = "-".join(codes)
    if name.lower() in RESERVED_NAMES:
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


def assign_by_language(documents: Sequence[Document | TokenDocument], groups: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
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


def language_groups(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The entry `languages`: cluster names to lists of codes."""
    groups = entry(settings, "languages", dict)
    for codes in groups.values():
        if not isinstance(codes, list) or not codes or not all(isinstance(code, str) for code in codes):
            raise TypeError(f"languages: {codes!r} is no list of codes")
    return groups
