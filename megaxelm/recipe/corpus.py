"""Sections of the recipe about text: where it comes from, the tokenizer, and where it is prepared."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from megaxelm.recipe.section import Section


class FieldNames(Section):
    """Which fields of a JSON line or table row hold what."""

    text: str = "text"
    """Name of the field that holds the text."""
    id: str = "id"
    """Name of the field that holds a stable identifier; documents without it get a hash of language and text."""
    language: str = "language"
    """Name of the field that holds the language code."""
    domain: str = "domain"
    """Name of the field that holds the topic or source, where there is one: the cluster report compares the clusters with it."""


class FileSource(Section):
    """Documents from files. A plain string in the recipe is short for `files:`."""

    files: list[str] = Field(min_length=1)
    """Globs or paths of files, relative to the current folder, or addresses that fsspec knows (`s3://bucket/*.jsonl.zst`, `hf://...`).
    Sorted by name before reading."""
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    """`auto` goes by the ending: .jsonl[.gz|.zst], .json[.gz|.zst], .parquet, .txt. `text`: one document a file."""
    language: str | None = None
    """Language of every document here. Without it the field of the document says, or for text files the folder's name."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class HuggingFaceSource(Section):
    """A dataset by its Hugging Face name, streamed with `datasets`."""

    huggingface: str
    """Name on the hub, or a local folder that `datasets.load_dataset` understands, e.g. `allenai/c4`."""
    config: str | None = None
    """Configuration name of the dataset, e.g. `sw`."""
    data_files: list[str] | None = None
    """Globs of files inside the dataset, to read only part of it."""
    split: str = "train"
    """Split to read."""
    language: str | None = None
    """Language of every document here; without it the language field of the row says."""


class CatalogSource(Section):
    """Message catalogs (gettext .mo) of installed Python packages: real multilingual text without a download."""

    catalogs: list[str] = Field(min_length=1)
    """Names of installed import packages, e.g. `django`. English is the message id."""
    min_letters: int = Field(25, ge=1)
    """Messages with fewer letters are left out."""
    messages_per_document: int = Field(12, ge=1)
    """Messages of one catalog that are joined, one a line, into one document."""


SOURCE_KINDS = ("files", "huggingface", "catalogs")


def _source_kind(value: Any) -> str:
    if isinstance(value, BaseModel):
        return {HuggingFaceSource: "huggingface", CatalogSource: "catalogs"}.get(type(value), "files")
    if isinstance(value, dict):
        # A misspelt `catalog:` is read as the kind that it is nearest to, so that the error names the right keys.
        for key in value:
            near = difflib.get_close_matches(str(key), SOURCE_KINDS, n=1, cutoff=0.8)
            if near:
                return near[0]
    return "files"


Source = Annotated[
    Annotated[FileSource, Tag("files")] | Annotated[HuggingFaceSource, Tag("huggingface")] | Annotated[CatalogSource, Tag("catalogs")],
    Discriminator(_source_kind),
]


def _as_sources(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [{"files": item} if isinstance(item, str) else item for item in values]


class HeldOutConfig(Section):
    """Documents kept from training when no `corpus.valid` is given, chosen by a stable hash of the NFC-normalised text."""

    share: float = Field(0.02, gt=0, lt=0.5)
    """Share of the documents of each language."""


class MinhashConfig(Section):
    """Near-duplicates by MinHash (datatrove): two documents are alike when all hashes of at least one bucket agree."""

    n_grams: int = Field(5, ge=1)
    """Words of a shingle."""
    buckets: int = Field(14, ge=1)
    """Buckets of the signature."""
    hashes_per_bucket: int = Field(8, ge=1)
    """Hashes of a bucket. Documents whose shingles agree by about (1 / buckets)^(1 / hashes_per_bucket) are found: .72 as it stands."""


class CorpusConfig(Section):
    """Where the text comes from."""

    train: list[Source] = Field(min_length=1)
    """Sources of training text: globs, Hugging Face datasets, or message catalogs."""
    valid: list[Source] = []
    """Sources of held-out text. Empty: a share of `train` is held out by hash."""
    languages: list[str] | None = Field(None, min_length=1)
    """Language codes to use, ISO 639-1 or 639-3; documents in others are skipped and counted. Null: all that occur."""
    fields: FieldNames = FieldNames()
    """Names of the fields in JSON lines, Parquet and Hugging Face rows."""
    language: Literal["field", "detect"] = "field"
    """Where the language of a document comes from: its field (or the source's `language:`), or detection from its text (py3langid, 97
    languages, no download), restricted to `languages` where they are given. A source's own `language:` wins."""
    deduplicate: Literal["exact", "minhash"] | None = None
    """Leave out repeated training documents. `exact`: the same NFC-normalised text; `minhash`: also near-duplicates. The first in order of
    reading stays."""
    minhash: MinhashConfig = MinhashConfig()
    """Settings of `deduplicate: minhash`."""
    held_out: HeldOutConfig = HeldOutConfig()
    """How documents are held out when `valid` is empty."""
    valid_bytes: int = Field(1_000_000, ge=1000)
    """Held-out text kept for evaluation, UTF-8 bytes a language at most; what is beyond is neither trained on nor scored."""
    sample_bytes: int = Field(4_000_000, ge=1000)
    """Training text kept as a sample for fitting tokenizer and partitioner, UTF-8 bytes a language at most."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """The run stops when more than this share of a file's documents is broken (not JSON, not text, not UTF-8, empty)."""

    _sources = field_validator("train", "valid", mode="before")(_as_sources)

    @field_validator("languages")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        twice = sorted({code for code in value or [] if (value or []).count(code) > 1})
        if twice:
            raise ValueError(f"corpus.languages names {', '.join(twice)} more than once: name each language once")
        return value


class TokenizerConfig(Section):
    """The tokenizer: trained here, or loaded."""

    load: str | None = Field(None, min_length=1)
    """Folder or Hugging Face name of a tokenizer to use. Null: a SentencePiece Unigram model is trained."""
    vocab_size: int = Field(8192, ge=300, le=2_000_000)
    """Pieces of a tokenizer trained here, bytes and special tokens included."""
    character_coverage: float = Field(0.9995, ge=0.98, le=1)
    """Share of characters that get a piece of their own; the rest is spelt in bytes."""
    sample_bytes: int = Field(5_000_000, ge=10_000)
    """Text that the tokenizer is trained on, UTF-8 bytes over all languages, equal shares where there is enough."""
    begin_of_document: bool = True
    """Put the BOS token in front of every document (and EOS behind, always). False is the way of the published runs."""


class SlurmConfig(Section):
    """What sbatch is told. Every field that is null is left to the cluster."""

    partition: str | None = None
    """Partition of the jobs."""
    time: str = "24:00:00"
    """Time limit of a task."""
    qos: str | None = None
    """Quality of service."""
    cpus_per_task: int = Field(1, ge=1)
    """Cores of a task; a task works with one, more serve for its memory."""
    memory_gb_per_cpu: int | None = Field(4, ge=1)
    """Memory of a core, GB."""
    sbatch: dict[str, str] = {}
    """Further options of sbatch, e.g. `{account: nlp}`."""


class ExecutorConfig(Section):
    """Where the corpus is prepared. A plain string in the recipe is short for `kind:`. Never changes a result."""

    kind: Literal["local", "slurm", "ray"] = "local"
    """`local`: processes on this machine; `slurm`: array jobs on folders that all nodes see; `ray`: a Ray cluster (extra `scale`)."""
    workers: int | None = Field(None, ge=1)
    """Tasks at a time. Null: the cores of this machine for `local`, as many as there are for `slurm` and `ray`."""
    tasks: int | None = Field(None, ge=1)
    """Parts that the work of a step is divided into, at most as many as it has. Null: as many as workers for `local`, else 64."""
    block_bytes: int = Field(32_000_000, ge=1000)
    """Text of one shard, UTF-8 bytes: what a task loses at most when it is killed. Another value tokenises again, to the same result."""
    slurm: SlurmConfig = SlurmConfig()
    """Settings of `kind: slurm`."""
    ray_address: str | None = None
    """Address of the Ray cluster. Null: the one that is running here, or a local one."""

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value
