"""The partitioner that a recipe asks for."""

from __future__ import annotations

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language import LanguagePartitioner
from megaxelm.cluster.mapping import MappingPartitioner
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.random_clusters import RandomPartitioner
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.cluster.typology import TypologyPartitioner
from megaxelm.errors import ClusterError
from megaxelm.recipe import ClustersConfig


def make_partitioner(config: ClustersConfig, tokenizer: TextEncoder | None) -> Partitioner:
    """A partitioner that is not fitted yet. The tokenizer is for TF-IDF over subwords, or balanced by tokens.

    Raises:
        ClusterError: if `clusters.k` is missing, or `clusters.mapping` names no clusters that can be made.
    """
    if config.partitioner == "language":
        return LanguagePartitioner(config.k)
    if config.partitioner == "mapping":
        return MappingPartitioner(config.mapping)
    if config.k is None:
        raise ClusterError(f"clusters.k is missing: give the number of clusters for the {config.partitioner} partitioner")
    if config.partitioner == "typology":
        return TypologyPartitioner(config.k, config.typology)
    if config.partitioner == "random":
        return RandomPartitioner(config.k, config.seed)
    return TfidfPartitioner(config.k, config.tfidf, config.seed, tokenizer)
