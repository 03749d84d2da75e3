"""Read a partitioner of any kind back from disk."""

from __future__ import annotations

from pathlib import Path

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language import LanguagePartitioner
from megaxelm.cluster.mapping import MappingPartitioner
from megaxelm.cluster.partitioner import ARRAYS_FILE, SETTINGS_FILE, Partitioner
from megaxelm.cluster.random_clusters import RandomPartitioner
from megaxelm.cluster.state import damaged_is_an_error, entry, read_state
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.cluster.typology import TypologyPartitioner

_KINDS: dict[str, type[Partitioner]] = {
    kind.kind: kind for kind in (LanguagePartitioner, MappingPartitioner, RandomPartitioner, TfidfPartitioner, TypologyPartitioner)
}


def load_partitioner(folder: Path | str, tokenizer: TextEncoder | None = None) -> Partitioner:
    """Read a partitioner that `Partitioner.save` wrote.

    `tokenizer` is needed to assign texts with a TF-IDF partitioner over subwords or balanced by tokens, and by no other.

    Raises:
        ClusterError: if files are missing or damaged, or the tokenizer is not the one the partitioner was fitted with.
    """
    folder = Path(folder)
    path = folder / SETTINGS_FILE
    settings, arrays = read_state(path, folder / ARRAYS_FILE)
    with damaged_is_an_error(path):
        kind = _KINDS.get(entry(settings, "kind", str))
        if kind is None:
            raise ValueError(f"kind = {settings['kind']!r} is none of {', '.join(sorted(_KINDS))}")
        names = settings["names"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("names is not a list of names")
        partitioner = kind._from_state(settings, arrays, tokenizer)
        partitioner.names = names
        groups = partitioner.languages()
        if groups is not None and list(groups) != names:
            raise ValueError("names and languages do not agree")
    return partitioner
