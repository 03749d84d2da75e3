"""The recipe's schema: one pydantic model a section, strict about names. Text, clusters and the mixture have modules of their own.

The docstring under each field is its documentation: `docs/recipe.md` is made from them. A field marked `affects_result=False` may
change without anything being made again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megaxelm.recipe.clusters import ClustersConfig
from megaxelm.recipe.corpus import CorpusConfig, ExecutorConfig, TokenizerConfig
from megaxelm.recipe.mixture import EnsembleConfig, EvaluationConfig
from megaxelm.recipe.rounds import RoundConfig, check_rounds, round_steps
from megaxelm.recipe.section import NO_EFFECT, Schedule, Section


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
    micro_batch_size: int = Field(8, ge=1, json_schema_extra=NO_EFFECT)
    """Sequences a forward pass on a device at most; the largest divisor of a rank's share that fits is taken."""
    steps: int = Field(100, ge=1)
    """Optimiser steps."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """Decay of the learning rate after the warm-up. `wsd`: constant, then linear over the last `decay_share` of the steps."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which `wsd` (warm-up, stable, decay) lowers the learning rate."""
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
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute type; with bf16 and fp16 the optimiser keeps fp32 weights. fp16 scales the loss dynamically. `auto`: bf16 where the device
    multiplies it in hardware, else fp32; which it was is printed and kept with the model."""
    document_mask: bool = True
    """Documents packed into one sequence do not see each other. False is the way of the published runs."""
    language_alpha: float = Field(1.0, ge=0, le=1)
    """Languages of a cluster are drawn with p ~ tokens^alpha: 1 proportional, 0 uniform."""
    language_weights: dict[str, float] = {}
    """Shares of the languages in place of `language_alpha`, e.g. `{en: 2, sw: 1}`; normalised over the languages a model trains on, all of
    which need one. The seed and the dense model use them too."""
    deepspeed_config: str = Field("zero1", json_schema_extra=NO_EFFECT)
    """A file, or the name of one in `ds_configs/`. `auto` values are filled from this recipe."""
    sequence_parallel: int = Field(1, ge=1, json_schema_extra=NO_EFFECT)
    """Ranks that share the tokens of each sequence, for long contexts (DeepSpeed-Ulysses); it divides the ranks, the heads and the sequence
    length."""
    attention: Literal["auto", "sdpa", "varlen", "flash2", "flash3", "flash4", "flex", "reference"] = Field(
        "auto", json_schema_extra=NO_EFFECT
    )
    """Attention backend; `auto` prints its choice: on CUDA the newest FlashAttention that imports and fits the device, torch's `varlen`, or
    `sdpa`; elsewhere `sdpa`."""
    kernels: Literal["auto", "triton", "torch"] = Field("auto", json_schema_extra=NO_EFFECT)
    """Norms, activations, rotary positions and the loss by the project's Triton kernels or by torch; `auto`: Triton on CUDA, except with
    `compile`, which fuses by itself."""
    activation_checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=2)] = Field("none", json_schema_extra=NO_EFFECT)
    """Recompute layers in the backward pass: less memory, with `full` about a third more time. A number n: every n-th layer alone."""
    compile: bool = Field(False, json_schema_extra=NO_EFFECT)
    """Compile each layer by torch.compile."""
    loss_chunk_rows: int | None = Field(None, ge=1, json_schema_extra=NO_EFFECT)
    """Rows of logits that exist at one time in the loss; empty: as many as 2 GiB hold on CUDA, 128 MiB on a CPU."""
    checkpoint_every: int = Field(500, ge=1, json_schema_extra=NO_EFFECT)
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = Field(1, ge=1, json_schema_extra=NO_EFFECT)
    """Newest checkpoints kept of each expert."""
    keep_every: int | None = Field(None, ge=1, json_schema_extra=NO_EFFECT)
    """Checkpoints at multiples of so many steps are kept for good, besides the newest."""
    async_checkpoints: bool = Field(False, json_schema_extra=NO_EFFECT)
    """Write checkpoints while training goes on: a copy of the state in memory, then a thread."""
    evaluate_every: int | None = Field(None, ge=1, json_schema_extra=NO_EFFECT)
    """Steps between evaluations on held-out text; null: none while training."""
    evaluate_documents: int = Field(20, ge=1, json_schema_extra=NO_EFFECT)
    """Held-out documents a language in each of these evaluations, cut at `sequence_length` tokens."""
    max_skipped_steps: int = Field(10, ge=1, json_schema_extra=NO_EFFECT)
    """A step whose loss or gradient is not finite is skipped; after so many in a row training stops. With fp16 the first steps may be
    skipped while the scale of the loss is found."""
    grace_seconds: float = Field(30.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds that are left to save after a signal to stop; a save is compared with it. DeepSpeed's launcher gives 30."""
    hang_seconds: float = Field(1800.0, gt=0, json_schema_extra=NO_EFFECT)
    """When a micro-batch, a save or a batch of an evaluation takes longer, the stacks of all threads are written to the log."""
    peak_tflops: float | None = Field(None, gt=0, json_schema_extra=NO_EFFECT)
    """Dense peak of one device in TFLOP/s, for MFU on devices that are not known."""
    log_every: int = Field(10, ge=1, json_schema_extra=NO_EFFECT)
    """Steps between lines in `metrics.jsonl` and TensorBoard."""
    num_devices: int = Field(1, ge=1, json_schema_extra=NO_EFFECT)
    """Devices (or CPU processes) an expert when `megaxelm` starts the training; more than one goes through `deepspeed`."""
    concurrent_experts: int = Field(1, ge=1, json_schema_extra=NO_EFFECT)
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
    schedule: Schedule | None = None
    """Decay in seed training; null: `train.schedule`."""
    final_lr_ratio: float | None = Field(None, ge=0, le=1)
    """Learning rate at the end of seed training as a share of the peak; null: `train.final_lr_ratio`."""
    decay_share: float | None = Field(None, gt=0, le=1)
    """Share of the steps of seed training in which `wsd` decays; null: `train.decay_share`."""
    language_alpha: float | None = Field(None, ge=0, le=1)
    """Language mix of seed training; null: `train.language_alpha`."""


class LoraConfig(Section):
    """Low-rank deltas (LoRA, Hu et al. 2021): every expert is the shared seed and two thin matrices a projection. Parameters of experts and
    dense baseline are then not equal, only their tokens."""

    rank: int = Field(16, ge=1)
    """Rank of the delta of a projection."""
    alpha: float = Field(32.0, gt=0)
    """The delta is B A times alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the input of a delta, in training."""
    targets: Literal["all"] | list[str] = "all"
    """Projections with a delta by the family's names (`q_proj`, `fc1`, ...), as peft takes them; `all` of attention and feed-forward."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of the deltas, which often bear ten times that of whole models; null: `train.lr`."""

    @field_validator("targets")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value or len(set(value)) != len(value) and value != "all":
            raise ValueError("experts.lora.targets: name at least one projection, and each once; or say all")
        return value


class ExpertsConfig(Section):
    """The experts and what they are compared with."""

    kind: Literal["full", "lora"] = "full"
    """`full`: every expert has weights of its own. `lora`: an expert is the frozen seed and a low-rank delta (`experts.lora`). Seed and
    dense baseline are always trained whole."""
    lora: LoraConfig = LoraConfig()
    """Low-rank deltas, for `kind: lora`."""

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


class Recipe(Section):
    """One run, whole."""

    name: str = Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra=NO_EFFECT)
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
    rounds: list[RoundConfig] = []
    """Rounds of hierarchical training, e.g. `[{k: 4}, {k: 8}, {k: 16}]`: each expert branches from its parent's of the round before, down
    the tree of the clusters; the last round's experts are the run's. Empty: all branch from the seed."""
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
        if self.experts.kind == "full" and self.experts.lora != LoraConfig():
            raise ValueError("experts.lora is set and experts.kind = full, which has no deltas: set experts.kind to lora, or leave it out")
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
        if self.rounds:
            self._check_rounds(k)
        if k and (self.ensemble.top_m or 1) > k:
            raise ValueError(
                f"ensemble.top_m = {self.ensemble.top_m} is more than clusters.k = {k}, the number of experts: choose 1 to {k}"
            )
        wrong = [m for m in self.evaluation.top_m if k and m > k]
        if wrong:
            raise ValueError(f"evaluation.top_m = {wrong[0]} is more than clusters.k = {k}, the number of experts: choose 1 to {k}")
        if self.ensemble.router == "fixed" and not self.ensemble.fixed_weights:
            raise ValueError("ensemble.fixed_weights is empty: the fixed router needs a weight for at least one cluster")
        if "fixed" in self.evaluation.routers and not self.ensemble.fixed_weights:
            raise ValueError("evaluation.routers names `fixed`, but ensemble.fixed_weights is empty: fill it or drop the router")
        if any(weight < 0 for weight in self.ensemble.fixed_weights.values()):
            raise ValueError("ensemble.fixed_weights: weights must not be negative")
        if self.ensemble.fallback == "dense" and not self.experts.dense:
            raise ValueError("ensemble.fallback = dense needs the dense baseline: set experts.dense = true, or the fallback to seed")
        return self

    def _check_rounds(self, k: int | None) -> None:
        experts, train = self.experts, self.train
        if experts.batch_sequences is not None:
            raise ValueError(
                f"experts.batch_sequences = {experts.batch_sequences} and rounds: each of a round's k experts gets "
                "train.batch_sequences / k; leave out experts.batch_sequences"
            )
        check_rounds(self.rounds, k, train.batch_sequences, self.clusters.partitioner)
        round_steps(self.rounds, experts.steps or train.steps, experts.allow_unequal_tokens)
