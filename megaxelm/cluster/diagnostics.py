"""What a partition of the corpus looks like, as numbers for `clusters/report.json`: `diagnose`.

How even the clusters are, whether they follow languages or domains, whether another seed gives the same ones, what is typical of each,
and a picture of the documents. `megaxelm/report/clusters.py` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.terms import CHARACTERS, read_terms, typical_terms

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document

UNITS = ("documents", "bytes", "tokens")
_SEEDS = 3
_SHUFFLES = 20
_TERMS = 12
_TERM_DOCUMENTS = 20_000
_TYPICAL_DOCUMENTS = 3
_SHOWN_CHARACTERS = 200
_SHOWN_DOMAINS = 24
_PICTURE_DOCUMENTS = 1500
_LEAST_FOR_TSNE = 20

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Name of a cluster -> language -> documents, bytes and tokens in the whole corpus. A cluster without documents may be absent."""


def diagnose(
    partitioner: Partitioner,
    sample: Sequence[Document],
    labels: NDArray[np.int64],
    counts: Counts,
    *,
    vectors: NDArray[np.float32] | None,
    domain_field: str,
    refit: Callable[[int], NDArray[np.int64]] | None,
    seed: int,
) -> dict[str, Any]:
    """Everything that the page of the clusters shows beyond names and counts, as plain values that go into JSON.

    Args:
        sample: documents of all languages, with their text.
        labels: cluster of each document of the sample, [sample].
        vectors: the sample in a space of TF-IDF, [sample, dimensions]. None: no typical documents and no picture, which is said.
        domain_field: key of `document.meta` that holds the domain of a document.
        refit: labels of the same sample when the partitioner is fitted with another seed; None where chance has no part in it.
        seed: the seed the partitioner was fitted with; also that of the picture.

    Returns:
        `balance`, `agreement`, `kind` (`languages`, `topics`, `mixed`, `neither` or `unknown`) with `sentence`, `domains`, `stability`,
        `typical_terms`, `typical_documents`, `picture`.

    Raises:
        ValueError: if labels or vectors are not those of the sample.
    """
    k = len(partitioner.names)
    if len(labels) != len(sample) or (vectors is not None and len(vectors) != len(sample)):
        raise ValueError(f"{len(sample)} documents, {len(labels)} labels, {None if vectors is None else len(vectors)} vectors")
    if len(labels) and not 0 <= labels.min() <= labels.max() < k:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {k} clusters")
    agreement, domains = _agreement(partitioner.names, sample, labels, counts, domain_field, seed)
    kind, sentence = _kind(agreement, partitioner.languages() is not None)
    return {
        "balance": {unit: _balance(_table(partitioner.names, counts, unit).sum(axis=1)) for unit in UNITS},
        "agreement": agreement,
        "kind": kind,
        "sentence": sentence,
        "domains": domains,
        "stability": _stability(partitioner.kind, labels, k, refit, seed),
        "typical_terms": _typical_terms(sample, labels, k, seed),
        "typical_documents": _typical_documents(sample, labels, k, vectors, domain_field),
        "picture": _picture(sample, labels, vectors, seed),
    }


def agreement_of(table: NDArray[np.int64]) -> dict[str, float | None]:
    """How well clusters and classes agree, from the counts of documents [clusters, classes].

    Returns:
        `purity`: share of documents that are of the largest class of their cluster, and `purity_of_one_cluster`: the same without
        clustering; `nmi`: normalised mutual information, 2 I / (H(clusters) + H(classes)), None where both entropies are 0;
        `explained`: I / H(clusters), the share of what there is to know about a document's cluster that its class tells, None for one
        cluster. It is 1 when every class lies in one cluster, however many classes share it, where the NMI is less than 1.
    """
    total = int(table.sum())
    if total == 0:
        return {"purity": None, "purity_of_one_cluster": None, "nmi": None, "explained": None}
    clusters, classes = _entropy(table.sum(axis=1)), _entropy(table.sum(axis=0))
    shared = max(0.0, clusters + classes - _entropy(table.ravel()))
    return {
        "purity": _rounded(table.max(axis=1).sum() / total),
        "purity_of_one_cluster": _rounded(table.sum(axis=0).max() / total),
        "nmi": _rounded(2 * shared / (clusters + classes)) if clusters + classes > 0 else None,
        "explained": _rounded(min(1.0, shared / clusters)) if clusters > 0 else None,
    }


def _entropy(counts: NDArray[Any]) -> float:
    """Entropy in bits of the shares that the counts have of their sum."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _table(names: Sequence[str], counts: Counts, unit: str) -> NDArray[np.int64]:
    """Counts of the corpus, [clusters, languages]."""
    languages = sorted({code for row in counts.values() for code in row})
    return np.array([[counts.get(name, {}).get(code, {}).get(unit, 0) for code in languages] for name in names], dtype=np.int64)


def _balance(sizes: NDArray[np.int64]) -> dict[str, float | int | None]:
    """How even the sizes of the clusters are: 2^entropy is the number of clusters of equal size that would be as uneven."""
    total = int(sizes.sum())
    if total == 0:
        return {"total": 0, "largest_to_mean": None, "smallest_to_mean": None, "entropy_bits": None, "effective_clusters": None}
    mean, entropy = total / len(sizes), _entropy(sizes)
    return {
        "total": total,
        "largest_to_mean": _rounded(sizes.max() / mean),
        "smallest_to_mean": _rounded(sizes.min() / mean),
        "entropy_bits": _rounded(entropy),
        "effective_clusters": round(2**entropy, 2),
    }


def _agreement(
    names: Sequence[str], sample: Sequence[Document], labels: NDArray[np.int64], counts: Counts, domain_field: str, seed: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Agreement with language (corpus; sample) and with domain (sample), and the documents by cluster and domain."""
    table = _table(names, counts, "documents")
    found: dict[str, Any] = {"language": {"documents": int(table.sum()), "classes": table.shape[1], **agreement_of(table)}}
    given = [document.meta.get(domain_field) for document in sample]
    known = np.array([index for index, value in enumerate(given) if value not in (None, "")], dtype=np.int64)
    found |= {"domain_field": domain_field, "sample": len(sample), "domain": None, "language_in_sample": None, "language_and_domain": None}
    if len(known) == 0:
        found["domain_reason"] = f"no document of the sample has the field {domain_field!r} (corpus.fields.domain)"
        return found, None
    domain_names, domains = np.unique([str(given[index]) for index in known], return_inverse=True)
    language_names, languages = np.unique([sample[index].language for index in known], return_inverse=True)
    found["domain"] = _against_chance(labels[known], domains, len(names), seed)
    found["language_in_sample"] = _against_chance(labels[known], languages, len(names), seed)
    found["language_and_domain"] = agreement_of(_cross(languages, domains, len(language_names)))["nmi"]
    if len(domain_names) == 1:
        found["domain_reason"] = f"all documents are of one domain, {str(domain_names[0])!r}"
    cross = _cross(labels[known], domains, len(names))
    order = np.lexsort((np.arange(len(domain_names)), -cross.sum(axis=0)))
    shown = order[:_SHOWN_DOMAINS]
    return found, {
        "names": [str(domain_names[index]) for index in shown],
        "documents": cross[:, shown].tolist(),
        "other_names": len(order) - len(shown),
        "other_documents": cross[:, order[_SHOWN_DOMAINS:]].sum(axis=1).tolist(),
    }


def _cross(rows: NDArray[np.int64], columns: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    num_columns = int(columns.max()) + 1
    return np.bincount(rows * num_columns + columns, minlength=num_rows * num_columns).reshape(num_rows, num_columns)


def _against_chance(labels: NDArray[np.int64], classes: NDArray[np.int64], k: int, seed: int) -> dict[str, Any]:
    """`agreement_of`, and `chance`: what `explained` would be were the same clusters dealt at random, a mean over shuffles.

    In a small sample with many classes that is far from 0.
    """
    found: dict[str, Any] = {"documents": len(labels), "classes": int(classes.max()) + 1, **agreement_of(_cross(labels, classes, k))}
    rng = np.random.default_rng(seed)
    chances = [agreement_of(_cross(rng.permutation(labels), classes, k))["explained"] for _ in range(_SHUFFLES)]
    found["chance"] = None if chances[0] is None else _rounded(sum(value or 0.0 for value in chances) / _SHUFFLES)
    return found


def _kind(agreement: Mapping[str, Any], by_language: bool) -> tuple[str, str]:
    """What the clusters are, and a sentence with the numbers that say so.

    The measure is `explained`, less what chance explains: whichever of language and domain tells at least twice as much as the other
    gives the name; below .1 of both it is neither.
    """
    domain = agreement["domain"] if agreement["domain"] and agreement["domain"]["classes"] > 1 else None
    language = agreement["language_in_sample"] if domain else agreement["language"]
    if language["explained"] is None:
        return "unknown", "All documents are in one cluster, so there is nothing to tell apart."
    told = f"a document's language tells {_told(language)} of what there is to know about its cluster (NMI {_show(language['nmi'])})"
    by = _above_chance(language)
    if domain is None:
        reason = agreement.get("domain_reason", "")
        if by_language or by >= 0.5:
            return "languages", f"The clusters are languages: {told}. What topics have to do with it is not known: {reason}."
        start = f"The clusters are not languages: {told}" if by < 0.1 else f"The clusters follow languages in part only: {told}"
        return "unknown", f"{start}. Whether they are topics is not known: {reason}."
    topics = _above_chance(domain)
    numbers = (
        f"{told}, its domain {_told(domain)} (NMI {_show(domain['nmi'])}), over the {language['documents']:,} documents of the sample that "
        "name a domain"
    )
    related = agreement["language_and_domain"]
    numbers += (
        f". Languages and domains are themselves related here (NMI {_show(related)}), which counts for both" if related >= 0.1 else ""
    )
    if max(by, topics) < 0.1:
        return "neither", f"The clusters are neither languages nor topics: {numbers}."
    if not by_language and max(by, topics) < 2 * min(by, topics):
        return "mixed", f"The clusters are mixed, of languages and of topics: {numbers}."
    kind = "languages" if by_language or by > topics else "topics"
    adverb = "" if max(by, topics) >= 0.5 or by_language else "mostly by their own order and only weakly "
    return kind, f"The clusters are {adverb}{kind}: {numbers}."


def _above_chance(agreement: Mapping[str, Any]) -> float:
    chance = agreement.get("chance", 0.0)
    return (agreement["explained"] - chance) / (1 - chance) if chance < 1 else 0.0


def _told(agreement: Mapping[str, Any]) -> str:
    chance = agreement.get("chance", 0.0)
    return f"{agreement['explained']:.0%}" + (f" ({chance:.0%} by chance)" if chance >= 0.01 else "")


def _show(value: float) -> str:
    return f"{value:.2f}"


def _stability(kind: str, labels: NDArray[np.int64], k: int, refit: Callable[[int], NDArray[np.int64]] | None, seed: int) -> dict[str, Any]:
    """Adjusted Rand index of every two fits with different seeds: 1 for the same clusters, 0 for as alike as by chance."""
    nothing: dict[str, Any] = {"seeds": [], "adjusted_rand": None, "mean": None, "least": None}
    if refit is None:
        return {"reason": f"the {kind} partitioner gives the same clusters with every seed", **nothing}
    if k == 1:
        return {"reason": "one cluster is the same with every seed", **nothing}
    from sklearn.metrics import adjusted_rand_score

    fits = [labels, *(refit(seed + number) for number in range(1, _SEEDS))]
    for other in fits:
        if len(other) != len(labels):
            raise ValueError(f"refit gave {len(other)} labels for {len(labels)} documents")
    scores = [[_rounded(adjusted_rand_score(first, second)) for second in fits] for first in fits]
    pairs = [scores[row][column] for row in range(_SEEDS) for column in range(row)]
    return {
        "reason": None,
        "seeds": [seed + number for number in range(_SEEDS)],
        "adjusted_rand": scores,
        "mean": _rounded(sum(pairs) / len(pairs)),
        "least": min(pairs),
    }


def _typical_terms(sample: Sequence[Document], labels: NDArray[np.int64], k: int, seed: int) -> dict[str, Any]:
    """Terms against all documents, and against those of the same languages."""
    chosen = _drawn(len(sample), _TERM_DOCUMENTS, seed)
    table = read_terms([sample[index].text for index in chosen])
    codes = {code: number for number, code in enumerate(sorted({document.language for document in sample}))}
    languages = np.array([codes[sample[index].language] for index in chosen], dtype=np.int64)
    return {
        "documents": len(chosen),
        "characters": CHARACTERS,
        "overall": typical_terms(table, labels[chosen], np.zeros_like(languages), k, _TERMS),
        "within_languages": typical_terms(table, labels[chosen], languages, k, _TERMS),
    }


def _drawn(size: int, most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` of the numbers below `size`, in order."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:most]).astype(np.int64)


def _typical_documents(
    sample: Sequence[Document], labels: NDArray[np.int64], k: int, vectors: NDArray[np.float32] | None, domain_field: str
) -> list[list[dict[str, Any]]] | None:
    """The documents nearest to the mean of their cluster's vectors, each text once. None without vectors."""
    if vectors is None:
        return None
    found: list[list[dict[str, Any]]] = []
    for cluster in range(k):
        members = np.flatnonzero(labels == cluster)
        rows: list[dict[str, Any]] = []
        found.append(rows)
        if len(members) == 0:
            continue
        distances = np.linalg.norm(vectors[members] - vectors[members].mean(axis=0), axis=1)
        for place in np.argsort(distances, kind="stable"):
            document = sample[members[place]]
            text = _beginning(document.text)
            if any(row["text"] == text for row in rows):
                continue
            domain = document.meta.get(domain_field)
            rows.append(
                {
                    "id": document.id,
                    "language": document.language,
                    "domain": None if domain in (None, "") else str(domain),
                    "distance": _rounded(distances[place]),
                    "text": text,
                }
            )
            if len(rows) == _TYPICAL_DOCUMENTS:
                break
    return found


def _beginning(text: str) -> str:
    words = " ".join(text[: 4 * _SHOWN_CHARACTERS].split())
    return words if len(words) <= _SHOWN_CHARACTERS else words[:_SHOWN_CHARACTERS].rstrip() + "…"


def _picture(
    sample: Sequence[Document], labels: NDArray[np.int64], vectors: NDArray[np.float32] | None, seed: int
) -> dict[str, Any] | None:
    """Places of documents on a plane, in 0 to 1; the same on every call on one machine. None without vectors or documents.

    t-SNE (van der Maaten and Hinton, 2008) keeps neighbours together; below 20 documents it means little and the two main directions
    (PCA) are taken.
    """
    if vectors is None or len(sample) == 0:
        return None
    from threadpoolctl import threadpool_limits

    chosen = _drawn(len(sample), _PICTURE_DOCUMENTS, seed)
    # Sums over threads differ in their last digits from call to call, and t-SNE makes other pictures of that.
    with threadpool_limits(1):
        method, places = _project(vectors[chosen].astype(np.float64), seed)
    places -= places.min(axis=0)
    places /= places.max() or 1.0
    codes = sorted({sample[index].language for index in chosen})
    return {
        "method": method,
        "documents": len(chosen),
        "sample": len(sample),
        "x": [_rounded(value) for value in places[:, 0]],
        "y": [_rounded(value) for value in places[:, 1]],
        "cluster": labels[chosen].tolist(),
        "languages": codes,
        "language": [codes.index(sample[index].language) for index in chosen],
    }


def _project(vectors: NDArray[np.float64], seed: int) -> tuple[str, NDArray[np.float64]]:
    centred = vectors - vectors.mean(axis=0)
    if len(vectors) < _LEAST_FOR_TSNE or min(centred.shape) < 2 or not centred.any():
        from sklearn.utils.extmath import svd_flip

        left, lengths, right = np.linalg.svd(centred, full_matrices=False)
        left, _ = svd_flip(left, right)
        places = np.zeros((len(vectors), 2))
        kept = min(2, len(lengths))
        places[:, :kept] = (left * lengths)[:, :kept]
        return "PCA", places
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    embedded = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, method="barnes_hut").fit_transform(vectors)
    return "t-SNE", np.asarray(embedded, dtype=np.float64)
