"""Documents of a source as the corpus stage sees them, without a run."""

from dataclasses import dataclass, field
from pathlib import Path

from megaxelm.corpus.document import Document
from megaxelm.corpus.inputs import AnySource, list_inputs
from megaxelm.corpus.prepare import load_manifest
from megaxelm.corpus.readers import Tally, read_rows
from megaxelm.corpus.scan import hash_id
from megaxelm.corpus.tokens import Blocks
from megaxelm.recipe import CorpusConfig, FieldNames, Recipe


@dataclass
class Report:
    """What the readings of all inputs met."""

    documents: int = 0
    broken: int = 0
    examples: list[str] = field(default_factory=list)


def read_source(source: AnySource, fields: FieldNames | None = None, share: float = 0.01) -> tuple[list[Document], Report]:
    """All documents of a source in order, and the account of them."""
    corpus = CorpusConfig(train=[source], fields=fields or FieldNames(), max_bad_share=share)
    documents, report = [], Report()
    for item in list_inputs([source]):
        tally = Tally(item.name, corpus)
        for row in read_rows(item, source, tally):
            documents.append(Document(row.text, row.id or hash_id(row.text, row.language), row.language, row.meta))
        report.broken += tally.broken
        report.examples += tally.examples
    report.documents = len(documents)
    return documents, report


def training_documents(recipe: Recipe, corpus_folder: Path, shards: Path) -> list[Document]:
    """What a prepared corpus trains on, in order."""
    assert load_manifest(corpus_folder)["languages"]
    blocks = Blocks(recipe, corpus_folder, shards)
    return [document for block in blocks.blocks for document in blocks.documents(block)]
