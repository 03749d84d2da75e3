"""The recipe's schema: one pydantic model a section, strict about names.

The docstring under each field is its documentation: `docs/recipe.md` is made from them. A field marked `affects_result=False` may
change without anything being made again.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic.config import JsonDict

_NO_EFFECT: JsonDict = {"affects_result": False}


class Section(BaseModel):
    """Base of every part of the recipe: strict about names, documented by the text under each field."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, frozen=True, allow_inf_nan=False)


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


class ModelConfig(Section):
    """Shape of a seed that is trained from scratch; ignored when `seed.load` is set."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "xglm"] = "llama"
    """Hugging Face family that checkpoints are exported to."""
    hidden_size: int = Field(256, ge=8)
    """Width."""
    num_layers: int = Field(6, ge=1)
    """Decoder layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads of grouped-query attention; null: as many as heads."""
    intermediate_size: int = Field(688, ge=8)
    """Width inside the feed-forward part."""
    max_positions: int = Field(2048, ge=8)
    """Longest sequence, tokens."""
    tie_embeddings: bool = True
    """Input embedding and output head share one matrix."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Residual dropout in training (published runs: 0.1); also applied when the seed was loaded."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of attention weights in training; an error with a backend that has none."""


class TrainConfig(Section):
    """Training of the dense baseline and the experts; the seed uses the same with its own `seed.*`."""

    sequence_length: int = Field(256, ge=8)
    """Tokens a sequence."""
    batch_sequences: int = Field(16, ge=1)
    """Sequences a step over *all* experts: the dense model gets all of them, each of k experts 1/k."""
    micro_batch_size: int = Field(8, ge=1, json_schema_extra=_NO_EFFECT)
    """Sequences a forward pass on a device at most; the largest divisor of a rank's share that fits is taken."""
    steps: int = Field(100, ge=1)
    """Optimiser steps."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam: decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam: decay of the second moment."""
    eps: float = Field(1e-6, gt=0)
    """Adam: term in the denominator."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW: decoupled weight decay, on matrices only."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute type; with bf16 the optimiser keeps fp32 weights."""
    document_mask: bool = True
    """Documents packed into one sequence do not see each other. False is the way of the published runs."""
    language_alpha: float = Field(1.0, ge=0, le=1)
    """Languages of a cluster are drawn with p ~ tokens^alpha: 1 proportional, 0 uniform."""
    language_weights: dict[str, float] = {}
    """Shares of the languages in place of `language_alpha`, e.g. `{en: 2, sw: 1}`; normalised over the languages a model trains on, all of
    which need one. The seed and the dense model use them too."""
    deepspeed_config: str = Field("zero1", json_schema_extra=_NO_EFFECT)
    """A file, or the name of one in `ds_configs/`. `auto` values are filled from this recipe."""
    attention: Literal["auto", "sdpa", "varlen"] = Field("auto", json_schema_extra=_NO_EFFECT)
    """Attention backend; `auto` prints its choice: `varlen` on CUDA where torch has it, else `sdpa`."""
    activation_checkpointing: bool = Field(False, json_schema_extra=_NO_EFFECT)
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    loss_chunk_rows: int = Field(1024, ge=1, json_schema_extra=_NO_EFFECT)
    """Rows of logits that exist at one time in the loss."""
    checkpoint_every: int = Field(500, ge=1, json_schema_extra=_NO_EFFECT)
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = Field(1, ge=1, json_schema_extra=_NO_EFFECT)
    """Newest checkpoints kept of each expert."""
    log_every: int = Field(10, ge=1, json_schema_extra=_NO_EFFECT)
    """Steps between lines in `metrics.jsonl` and TensorBoard."""
    num_devices: int = Field(1, ge=1, json_schema_extra=_NO_EFFECT)
    """Devices (or CPU processes) an expert when `megaxelm` starts the training; more than one goes through `deepspeed`."""
    concurrent_experts: int = Field(1, ge=1, json_schema_extra=_NO_EFFECT)
    """Experts trained at the same time on a machine without GPUs; the cores are divided among them."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sample order, the weights and the dropout."""

    @field_validator("language_weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [code for code, weight in value.items() if weight <= 0]
        if wrong:
            raise ValueError(
                f"train.language_weights: the weight of {', '.join(wrong)} must be above 0; leave a language out of the corpus instead"
            )
        return value


class SeedConfig(Section):
    """The seed model that every expert branches from."""

    load: str | None = Field(None, min_length=1)
    """Hugging Face checkpoint folder or name of the seed. Null: trained from scratch with `model`."""
    steps: int | None = Field(None, ge=1)
    """Steps of seed training; null: `train.steps`."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of seed training; null: `train.lr`."""
    warmup_steps: int | None = Field(None, ge=0)
    """Warm-up of seed training; null: `train.warmup_steps`."""
    schedule: Literal["linear", "cosine", "constant"] | None = None
    """Decay in seed training; null: `train.schedule`."""
    final_lr_ratio: float | None = Field(None, ge=0, le=1)
    """Learning rate at the end of seed training as a share of the peak; null: `train.final_lr_ratio`."""
    language_alpha: float | None = Field(None, ge=0, le=1)
    """Language mix of seed training; null: `train.language_alpha`."""


class ExpertsConfig(Section):
    """The experts and what they are compared with."""

    dense: bool = True
    """Train the dense baseline: the same seed, the whole corpus, the tokens of all experts together."""
    batch_sequences: int | None = Field(None, ge=1)
    """Sequences a step of one expert; null: `train.batch_sequences` / k, which makes the comparison equal."""
    steps: int | None = Field(None, ge=1)
    """Steps of one expert; null: `train.steps`."""
    allow_unequal_tokens: bool = False
    """Go on although experts and dense baseline get different totals of tokens."""


class ExportConfig(Section):
    """Hugging Face checkpoints."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the exported weights. Experts branch from the seed's export, so bfloat16 rounds the start."""


RouterName = Literal["language", "tfidf", "posterior", "uniform", "fixed"]


class EnsembleConfig(Section):
    """The mixture of experts at inference (method: paper, section 3.3)."""

    router: RouterName = "posterior"
    """Default router of the ensemble folder."""
    top_m: int | None = Field(None, ge=1)
    """Experts kept and run; null: all."""
    temperature: float = Field(0.1, gt=0)
    """T of the `tfidf` router: w ~ exp(-distance^power / T). Published: 0.1 for perplexity, 1 downstream."""
    distance_power: Literal[2, 4] = 2
    """2 is the paper's formula, 4 what its released code computes."""
    fixed_weights: dict[str, float] = {}
    """Weights by cluster name of the `fixed` router; normalised; clusters not named get none."""


class EvaluationConfig(Section):
    """Perplexity and bits per byte on held-out text."""

    max_documents: int = Field(200, ge=1)
    """Held-out documents scored a language at most, in order of their hash."""
    sequence_length: int | None = Field(None, ge=8)
    """Tokens scored of a document; the rest is cut. Null: `train.sequence_length`."""
    routers: list[RouterName] = Field(["language", "tfidf", "posterior", "uniform"], min_length=1)
    """Mixtures to evaluate."""


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


class Recipe(Section):
    """One run, whole."""

    name: str = Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra=_NO_EFFECT)
    """Name of the run: its folder is `runs/<name>`."""
    corpus: CorpusConfig
    """Where the text comes from."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer: trained here, or loaded."""
    clusters: ClustersConfig
    """How the corpus is divided among experts."""
    executor: ExecutorConfig = ExecutorConfig()
    """Where the corpus is prepared."""
    model: ModelConfig = ModelConfig()
    """Shape of a seed trained from scratch."""
    seed: SeedConfig = SeedConfig()
    """The seed model."""
    train: TrainConfig = TrainConfig()
    """Training of dense baseline and experts."""
    experts: ExpertsConfig = ExpertsConfig()
    """The experts and what they are compared with."""
    export: ExportConfig = ExportConfig()
    """Hugging Face checkpoints."""
    ensemble: EnsembleConfig = EnsembleConfig()
    """The mixture at inference."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Perplexity and bits per byte on held-out text."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        train, model = self.train, self.model
        if self.seed.load is None:
            if train.sequence_length > model.max_positions:
                raise ValueError(
                    f"train.sequence_length = {train.sequence_length} is longer than model.max_positions = {model.max_positions}: "
                    "lower the first or raise the second"
                )
            if model.hidden_size % model.num_heads:
                raise ValueError(
                    f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_heads = {model.num_heads}: change one"
                )
            if model.num_kv_heads and model.num_heads % model.num_kv_heads:
                raise ValueError(
                    f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}: change one"
                )
            if model.family == "xglm" and model.num_kv_heads not in (None, model.num_heads):
                raise ValueError("model.num_kv_heads: the xglm family has no grouped-query attention; leave it out")
            if (self.evaluation.sequence_length or 0) > model.max_positions:
                raise ValueError(
                    f"evaluation.sequence_length = {self.evaluation.sequence_length} is longer than model.max_positions = "
                    f"{model.max_positions}: lower the first or raise the second"
                )
        elif self.tokenizer.load is None:
            raise ValueError(
                "seed.load is set and tokenizer.load is not: the ids of a tokenizer trained here would mean nothing to a loaded seed. Set "
                "tokenizer.load to the seed's"
            )
        if train.warmup_steps >= train.steps:
            raise ValueError(f"train.warmup_steps = {train.warmup_steps} must be below train.steps = {train.steps}")
        if train.document_mask and not self.tokenizer.begin_of_document:
            raise ValueError(
                "train.document_mask = true needs tokenizer.begin_of_document = true, or the first token of a document would be "
                "predicted from nothing: set both to true, or both to false"
            )
        k = self.clusters.num_clusters
        if k and self.experts.batch_sequences is None and train.batch_sequences % k:
            near = max(k, round(train.batch_sequences / k) * k)
            raise ValueError(
                f"train.batch_sequences = {train.batch_sequences} is not a multiple of clusters.k = {k}, so the experts cannot share "
                f"the batch equally: choose {near}, for example"
            )
        if k and (self.ensemble.top_m or 1) > k:
            raise ValueError(
                f"ensemble.top_m = {self.ensemble.top_m} is more than clusters.k = {k}, the number of experts: choose 1 to {k}"
            )
        if self.ensemble.router == "fixed" and not self.ensemble.fixed_weights:
            raise ValueError("ensemble.fixed_weights is empty: the fixed router needs a weight for at least one cluster")
        if "fixed" in self.evaluation.routers and not self.ensemble.fixed_weights:
            raise ValueError("evaluation.routers names `fixed`, but ensemble.fixed_weights is empty: fill it or drop the router")
        if any(weight < 0 for weight in self.ensemble.fixed_weights.values()):
            raise ValueError("ensemble.fixed_weights: weights must not be negative")
        return self


def result_settings(section: Section) -> dict[str, Any]:
    """The fields of a section that what is made depends on: those not marked `affects_result=False`, nested."""
    settings: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_result") is False:
            continue
        value = getattr(section, name)
        settings[name] = result_settings(value) if isinstance(value, Section) else section.model_dump(mode="json", include={name})[name]
    return settings
