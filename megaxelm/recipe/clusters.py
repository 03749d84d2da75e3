"""Section of the recipe about clusters: how the corpus is divided among experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megaxelm.recipe.section import Section


class TypologyConfig(Section):
    """Languages grouped by their URIEL features (paper, section 3.1)."""

    method: Literal["auto", "paired", "agglomerative"] = "auto"
    """`paired`: the published rounds of greedy pairing, which give k = n / 2^r only; `agglomerative`: any k. `auto` takes the first
    where it gives k, else the second, and says so."""
    linkage: Literal["single", "average", "complete"] = "average"
    """Distance of two clusters in agglomerative merging: the smallest, mean or largest over the pairs of their languages."""
    balance: Literal["none", "tokens"] = "none"
    """`tokens`: agglomerative merging keeps clusters from growing far beyond an equal share of the corpus' tokens."""
    tolerance: float = Field(0.5, ge=0)
    """With `balance: tokens`: how far the tokens of a cluster may go beyond total / k, as a share of it. One language alone may."""
    features: str = "syntax_average"
    """URIEL feature set, as lang2vec names it."""
    distances: str | None = Field(None, min_length=1)
    """CSV file of your own distances in place of URIEL: the first row and column name the languages, the rest is a symmetric matrix."""


class TfidfConfig(Section):
    """Documents as TF-IDF vectors, reduced by SVD and cut by balanced k-means (paper, section 3.1)."""

    analyzer: Literal["subword", "char", "word"] = "subword"
    """Terms: pieces of the recipe's tokenizer and their pairs; character n-grams of 1 to 4; or the published word pattern, for comparison
    (it cuts Hindi and Thai to pieces and takes whole clauses of Chinese and Japanese for words)."""
    dimensions: int = Field(100, ge=2)
    """Dimensions after truncated SVD; fewer where the sample has fewer."""
    max_features: int = Field(50_000, ge=100)
    """Most frequent terms kept."""
    sample_documents: int = Field(20_000, ge=2)
    """Documents the space is fitted on, stratified by language; `corpus.sample_bytes` bounds how many there are."""
    balance: Literal["documents", "tokens"] = "documents"
    """What the clusters of the sample hold equally much of."""
    tolerance: float = Field(0.0, ge=0)
    """How far a cluster of the sample may be from an equal share, as a part of it; 0: as equal as can be."""
    starts: int = Field(8, ge=1)
    """Starts of balanced k-means; the best is kept."""
    iterations: int = Field(20, ge=1)
    """Iterations of balanced k-means at most."""
    assign: Literal["nearest", "balanced"] = "nearest"
    """How the documents of the corpus find their cluster: the nearest centre (paper), or balanced within each block of the corpus."""


class ClustersConfig(Section):
    """How the corpus is divided among experts."""

    partitioner: Literal["typology", "tfidf", "language", "mapping", "random"] = "typology"
    """`typology`: relatives share an expert; `tfidf`: similar documents do; `language`: one expert a language; `mapping`: the
    languages that you name; `random`: documents at random, the control."""
    k: int | None = Field(None, ge=1)
    """Number of clusters, so of experts. Required, except for `language` and `mapping`, where it follows."""
    typology: TypologyConfig = TypologyConfig()
    """Settings of the typology partitioner."""
    tfidf: TfidfConfig = TfidfConfig()
    """Settings of the TF-IDF partitioner, and of the vector space behind the `tfidf` router."""
    mapping: dict[str, list[str]] = {}
    """For `mapping`: cluster names to languages, e.g. `{slavic: [bg, ru], rest: [en, de]}`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of samples, starts and the random partitioner."""

    @model_validator(mode="after")
    def _needs_k(self) -> ClustersConfig:
        if self.partitioner == "mapping":
            if not self.mapping:
                raise ValueError("clusters.mapping is empty: name clusters and their languages, e.g. {slavic: [bg, ru], rest: [en, de]}")
            if self.k not in (None, len(self.mapping)):
                raise ValueError(
                    f"clusters.k = {self.k}, but clusters.mapping names {len(self.mapping)} clusters: leave k out or make them agree"
                )
        elif self.k is None and self.partitioner != "language":
            raise ValueError(f"clusters.k is missing: give the number of clusters for the {self.partitioner} partitioner")
        return self

    @property
    def num_clusters(self) -> int | None:
        """k, or the number of clusters that `mapping` names; None for `language` without k."""
        return len(self.mapping) if self.partitioner == "mapping" else self.k
