"""The folder of the `index` stage: `<cluster>/<language>.{bin,idx}` under one manifest, opened and verified.

`manifest.json`: `tokenizer` {name, fingerprint}, `vocab_size`, `clusters_fingerprint` (what the documents were assigned by), `verified`
(always true: the manifest is written when every index has been) and `clusters` {cluster: {language: {documents, tokens, bytes,
xxh3: {bin, idx}}}}.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megaxelm.corpus.token_index import TokenIndex, index_paths
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ClusterError, StageError, TokenIndexError
from megaxelm.files import hash_file, read_json, write_json

MANIFEST = "manifest.json"
_WAY_OUT = "make the index again (megaxelm run --from index)"


def write_manifest(
    folder: Path, tokenizer: Tokenizer, clusters_fingerprint: str, clusters: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """Write the manifest of a folder whose indexes were all verified (`TokenIndex.verify`) when they were made.

    Args:
        clusters: {cluster: {language: {documents, tokens, bytes, xxh3: {bin, idx}}}}; the hashes are those that the writers returned.

    Raises:
        TokenIndexError: an index that does not open, or is not of the size that is told.
    """
    for cluster, languages in clusters.items():
        for language, counts in languages.items():
            _open(folder, cluster, language, counts)
    manifest = {
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "vocab_size": tokenizer.vocab_size,
        "clusters_fingerprint": clusters_fingerprint,
        "verified": True,
        "clusters": clusters,
    }
    write_json(folder / MANIFEST, manifest)


def load_index_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json` of the index stage, with every field of the proper type.

    Raises:
        TokenIndexError: missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path, tokenizer=dict, vocab_size=int, clusters_fingerprint=str, verified=bool, clusters=dict)
    except StageError as error:
        raise TokenIndexError(f"{error} (--from index)") from None
    if not manifest["clusters"]:
        raise TokenIndexError(f"{path}: names no cluster; {_WAY_OUT}")
    if not all(isinstance(manifest["tokenizer"].get(key), str) for key in ("name", "fingerprint")):
        raise TokenIndexError(f"{path}: damaged (name and fingerprint of the tokenizer are not in it); {_WAY_OUT}")
    for cluster, languages in manifest["clusters"].items():
        for language, counts in languages.items() if isinstance(languages, dict) else [("", None)]:
            if not _are_counts(counts):
                raise TokenIndexError(f"{path}: damaged (no proper counts of {cluster}/{language}); {_WAY_OUT}")
    return manifest


def _are_counts(counts: Any) -> bool:
    if not isinstance(counts, dict) or not isinstance(counts.get("xxh3"), dict):
        return False
    whole = all(isinstance(counts.get(key), int) for key in ("documents", "tokens", "bytes"))
    return whole and all(isinstance(counts["xxh3"].get(ending), str) for ending in ("bin", "idx"))


def open_streams(folder: Path, clusters: Iterable[str] | None = None, tokenizer: Tokenizer | None = None) -> dict[str, list[TokenIndex]]:
    """The token indexes of some clusters, or of all, by language; sizes are checked against the manifest.

    Args:
        tokenizer: the one that the index must have been made with.

    Raises:
        ClusterError: a cluster that the index does not have.
        TokenIndexError: a damaged index, one that is not the manifest's, or one made with another tokenizer.
    """
    manifest = load_index_manifest(folder)
    if tokenizer is not None:
        check_tokenizer(folder, tokenizer)
    known = manifest["clusters"]
    streams: dict[str, list[TokenIndex]] = {}
    for cluster in sorted(known) if clusters is None else clusters:
        if cluster not in known:
            raise ClusterError(f"the index has no cluster {cluster}; it has {', '.join(sorted(known))}")
        for language, counts in sorted(known[cluster].items()):
            streams.setdefault(language, []).append(_open(folder, cluster, language, counts))
    return dict(sorted(streams.items()))


def verify_index(folder: Path, tokenizer: Tokenizer | None = None, clusters_fingerprint: str | None = None) -> Iterator[str]:
    """Read every index through: contents against the hashes of the manifest, order, lengths, ids. Yields a line for each that is sound.

    Args:
        tokenizer: the one that the index must have been made with.
        clusters_fingerprint: the clusters that it must have been made with.

    Raises:
        TokenIndexError: the first that does not hold.
    """
    manifest = load_index_manifest(folder)
    if tokenizer is not None:
        check_tokenizer(folder, tokenizer)
    made = manifest["clusters_fingerprint"]
    if clusters_fingerprint is not None and made != clusters_fingerprint:
        raise TokenIndexError(
            f"{folder}: documents were assigned by the clusters {made}, and the run's are now {clusters_fingerprint}; {_WAY_OUT}"
        )
    open_streams(folder)
    for cluster, languages in sorted(manifest["clusters"].items()):
        for language, counts in sorted(languages.items()):
            prefix = folder / cluster / language
            for path in index_paths(prefix):
                if hash_file(path) != counts["xxh3"][path.suffix[1:]]:
                    raise TokenIndexError(f"{path}: changed since it was written; {_WAY_OUT}")
            TokenIndex(prefix).verify(manifest["vocab_size"])
            yield f"{cluster}/{language}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, sound"


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that the index was not made with.

    Raises:
        TokenIndexError: naming both.
    """
    made = load_index_manifest(folder)["tokenizer"]
    if made["fingerprint"] != tokenizer.fingerprint:
        raise TokenIndexError(
            f"{folder}: was made with the tokenizer `{made['name']}` ({made['fingerprint']}), the run has `{tokenizer.name}` "
            f"({tokenizer.fingerprint}), whose ids mean other text; {_WAY_OUT}"
        )


def _open(folder: Path, cluster: str, language: str, counts: Mapping[str, Any]) -> TokenIndex:
    index = TokenIndex(folder / cluster / language)
    if (index.num_documents, index.num_tokens) != (counts["documents"], counts["tokens"]):
        raise TokenIndexError(
            f"token index {cluster}/{language} has {index.num_documents} documents and {index.num_tokens} tokens, its manifest "
            f"says {counts['documents']} and {counts['tokens']}: files were mixed up; {_WAY_OUT}"
        )
    return index


def open_each(folder: Path) -> Iterator[tuple[str, TokenIndex, int]]:
    """Name `<cluster>/<language>`, index and UTF-8 bytes of text of each index of a folder."""
    for cluster, languages in sorted(load_index_manifest(folder)["clusters"].items()):
        for language, counts in sorted(languages.items()):
            yield f"{cluster}/{language}", _open(folder, cluster, language, counts), counts["bytes"]


def open_one(folder: Path, name: str) -> TokenIndex:
    """The index `<cluster>/<language>` of a folder.

    Raises:
        TokenIndexError: there is none; those there are get named.
    """
    known = load_index_manifest(folder)["clusters"]
    cluster, _, language = name.partition("/")
    if language not in known.get(cluster, {}):
        names = sorted(f"{cluster}/{language}" for cluster, languages in known.items() for language in languages)
        raise TokenIndexError(f"{folder}: has no index {name!r}; it has {', '.join(names)}")
    return _open(folder, cluster, language, known[cluster][language])


def merged_vocab_size(prefixes: Iterable[Path]) -> int | None:
    """The vocabulary that indexes share, from the manifests they lie under; None where none has one.

    Raises:
        TokenIndexError: two were made with different tokenizers.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for prefix in prefixes:
        folder = Path(prefix).absolute().parent.parent
        if (folder / MANIFEST).is_file():
            manifest = load_index_manifest(folder)
            found.setdefault(manifest["tokenizer"]["fingerprint"], (prefix, manifest))
    if len(found) > 1:
        said = " and ".join(f"{prefix} with `{manifest['tokenizer']['name']}` ({key})" for key, (prefix, manifest) in found.items())
        raise TokenIndexError(f"these indexes cannot be merged, their ids mean different text: {said}; merge indexes of one tokenizer")
    return next((manifest["vocab_size"] for _, manifest in found.values()), None)
