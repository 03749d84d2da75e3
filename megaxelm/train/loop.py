"""Train one model with DeepSpeed: build, resume, step, save, export.

The loss of a step is the mean over its predicted tokens of all ranks and micro-batches: every rank knows the step's total before the
first forward pass, and DeepSpeed's averaging over ranks and micro-batches is undone by the scale of the loss.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaxelm.corpus.index_folder import load_index_manifest, open_streams
from megaxelm.corpus.packing import PackedBatch, pack
from megaxelm.corpus.prepare import read_documents
from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ModelError, StageError, TrainError
from megaxelm.files import hash_value, write_json
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.export import write_export
from megaxelm.model.hub import load_pretrained
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder
from megaxelm.train.checkpoint import Progress, complete_checkpoint, find_checkpoint
from megaxelm.train.environment import Processes
from megaxelm.train.members import Member, check_language_weights
from megaxelm.train.metrics import Metrics
from megaxelm.train.schedule import learning_rate
from megaxelm_kernels.attention import choose_backend
from megaxelm_kernels.dropout import DropoutKey, dropout_keys


@dataclass(frozen=True)
class Setting:
    """What one process needs to train its part of one model."""

    run: RunFolder
    recipe: Recipe
    member: Member
    ds_config: dict[str, Any]
    processes: Processes
    device: torch.device

    @property
    def folder(self) -> Path:
        return self.run.expert(self.member.name)

    @property
    def is_first(self) -> bool:
        return self.processes.rank == 0


def build_model(setting: Setting, tokenizer: Tokenizer) -> Decoder:
    """The model at its start: the parent's export, a loaded seed, or fresh weights.

    Raises:
        TokenizerError or ModelError: the loaded seed does not fit the tokenizer or the sequence length.
    """
    recipe, member = setting.recipe, setting.member
    if member.parent is not None:
        model = load_pretrained(setting.run.expert(member.parent) / "export")
    elif recipe.seed.load is not None:
        model = load_pretrained(recipe.seed.load)
    else:
        config = config_from_recipe(recipe.model, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.pad_token_id)
        model = Decoder(config)
        model.initialise(recipe.train.seed)
    if member.parent is None and recipe.seed.load is not None:
        _check_tokenizer_of_seed(recipe.seed.load, model, tokenizer)
    model.set_dropout(recipe.model.dropout, recipe.model.attention_dropout)
    if member.sequence_length > model.config.max_positions:
        raise ModelError(
            f"train.sequence_length = {member.sequence_length} is longer than the {model.config.max_positions} positions of the seed: "
            "shorten it"
        )
    return model.train()


def _check_tokenizer_of_seed(seed: str, model: Decoder, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"seed.load = {seed}: its vocabulary has {model.config.vocab_size} entries, the tokenizer {tokenizer.vocab_size}: "
            "set tokenizer.load to the tokenizer of the seed"
        )
    if (Path(seed) / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        if AutoTokenizer.from_pretrained(seed).get_vocab() != tokenizer.hf.get_vocab():
            raise ModelError(f"seed.load = {seed}: its tokenizer has other pieces than the run's: set tokenizer.load = {seed}")


def export_seed(setting: Setting) -> None:
    """A loaded seed is trained no further: its export is the same model with the run's tokenizer. Rank 0 does it."""
    if not setting.is_first:
        return
    tokenizer = Tokenizer.load(setting.run.folder("tokenizer"))
    model = build_model(setting, tokenizer)
    _export(setting, model, dict(model.named_parameters()), tokenizer)


def train(setting: Setting, progress_bar: Callable[[Member, int], Iterable[int]]) -> None:
    """Train to the last step, resuming from the newest complete checkpoint, and export. Runs on every rank.

    Args:
        progress_bar: steps from the given one on, with a bar; used on rank 0.
    """
    import deepspeed

    recipe, member, processes = setting.recipe, setting.member, setting.processes
    config = recipe.train
    tokenizer = Tokenizer.load(setting.run.folder("tokenizer"))
    index = setting.run.folder("index")
    streams = open_streams(index, member.clusters, tokenizer)
    check_language_weights(recipe, {language for languages in load_index_manifest(index)["clusters"].values() for language in languages})
    sample_seed = member.sample_seed(config.seed)
    blend = Blend(streams, member.sequence_length, member.language_alpha, sample_seed, config.language_weights)
    model = build_model(setting, tokenizer)
    try:
        # The packed kernel of torch has no fp32 form.
        wanted = "sdpa" if config.attention == "auto" and config.precision == "fp32" else config.attention
        backend = choose_backend(wanted, setting.device, model.config.attention_dropout)
    except ValueError as error:
        raise TrainError(f"train.attention = {config.attention}: {error}") from None
    if config.activation_checkpointing:
        model.enable_activation_checkpointing()
    options = {"attention": backend, "loss_chunk_rows": config.loss_chunk_rows}
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=_parameter_groups(model, config.weight_decay), config=setting.ds_config
    )
    start = _resume(setting, engine)
    if setting.is_first:
        _record_choices(setting, model, backend, start)
    metrics = Metrics(setting.folder, start.step) if setting.is_first else None
    bar = progress_bar(member, start.step) if setting.is_first else range(start.step, member.steps)
    steps = _Steps(setting, engine, blend, options)
    _loop(setting, steps, metrics, bar)
    parameters = _gather_fp32(engine.module, setting.is_first)
    if setting.is_first:
        _export(setting, engine.module, parameters, tokenizer)
    _barrier(processes)
    if metrics is not None:
        metrics.close()


def _loop(setting: Setting, steps: _Steps, metrics: Metrics | None, bar: Iterable[int]) -> None:
    member, config = setting.member, setting.recipe.train
    loss_sum, targets, tokens, began, since = 0.0, 0, 0, time.monotonic(), time.monotonic()
    for step in bar:
        result = steps.run(step)
        loss_sum, targets, tokens = loss_sum + result.loss_sum, targets + result.targets, tokens + result.tokens
        done = step + 1
        if done % config.log_every == 0 or done == member.steps:
            loss = _sum_over_ranks(loss_sum, setting) / max(1, targets)
            if metrics is not None:
                now = time.monotonic()
                line: dict[str, Any] = {"step": done, "loss": loss, "lr": result.lr}
                line |= {} if result.grad_norm is None else {"grad_norm": result.grad_norm}
                line |= {"tokens": done * member.batch_sequences * member.sequence_length}
                line |= {"language_tokens": language_tokens(steps.blend, done * member.batch_sequences)}
                metrics.write(line | {"tokens_per_second": tokens / max(now - since, 1e-9), "seconds": now - began})
                since = now
            loss_sum, targets, tokens = 0.0, 0, 0
        if done % config.checkpoint_every == 0 or done == member.steps:
            _save(setting, steps.engine, Progress(done, done * member.batch_sequences))


def language_tokens(blend: Blend, samples: int) -> dict[str, int]:
    """Tokens of each language among the first `samples` samples of a run: by arithmetic, so the same after a resume and on any ranks."""
    return {language: count * blend.sequence_length for language, count in sorted(blend.counts(samples).items())}


@dataclass(frozen=True)
class StepResult:
    """`loss_sum` of this rank in nats; `targets` and `tokens` over all ranks."""

    loss_sum: float
    targets: int
    tokens: int
    lr: float
    grad_norm: float | None


class _Steps:
    """Optimiser steps of one rank: which samples, forward and backward of each micro-batch, the update."""

    def __init__(self, setting: Setting, engine: Any, blend: Blend, options: dict[str, Any]) -> None:
        self.setting = setting
        self.engine = engine
        self.blend = blend
        self.options = options

    def run(self, step: int) -> StepResult:
        setting, engine = self.setting, self.engine
        member, config = setting.member, setting.recipe.train
        world = setting.processes.world_size
        batches = list(self._batches(step))
        targets = int(_sum_over_ranks(sum(batch.num_targets for batch in batches), setting))
        if targets == 0:
            raise TrainError(f"`{member.name}`: step {step} has no token to predict; are all documents of its languages empty?")
        lr = learning_rate(member, step)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=setting.device)
        for batch in batches:
            output = engine(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                labels=batch.labels,
                dropout=self._dropout(batch, step, member.sample_seed(config.seed)),
                **self.options,
            )
            loss = output.loss_sum * (world * len(batches) / targets)
            engine.backward(loss)
            engine.step()
            loss_sum += output.loss_sum.detach()
        norm = engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        total = float(loss_sum)
        if not math.isfinite(total) or (norm is not None and not math.isfinite(norm)):
            # Before this step is saved: a checkpoint of broken weights would take the place of a good one.
            raise TrainError(
                f"`{member.name}`: at step {step + 1} the loss is {total / targets:.4g} and the gradient norm {norm}; checkpoints before "
                "it stay. Lower train.lr, raise train.warmup_steps, or set train.precision = fp32; its training then begins anew"
            )
        tokens = member.batch_sequences * member.sequence_length
        return StepResult(total, targets, tokens, lr, norm)

    def _batches(self, step: int) -> Iterator[PackedBatch]:
        """This rank's share of the step's samples, in micro-batches. The samples of a step do not depend on the number of ranks."""
        member, processes = self.setting.member, self.setting.processes
        share = member.batch_sequences // processes.world_size
        first = step * member.batch_sequences + processes.rank * share
        micro = self.setting.ds_config["train_micro_batch_size_per_gpu"]
        for start in range(first, first + share, micro):
            windows = self.blend.read(start, micro)
            yield pack(windows, self.setting.recipe.train.document_mask).to(self.setting.device)

    def _dropout(self, batch: PackedBatch, step: int, seed: int) -> DropoutKey | None:
        model = self.setting.recipe.model
        if model.attention_dropout:
            # The backends draw attention dropout from torch's generator: the same seed at the same place makes a resumed run repeat it.
            torch.manual_seed(int(hash_value([seed, step, int(batch.sample_ids[0])])[:15], 16))
        if not model.dropout and not model.attention_dropout:
            return None
        length = self.setting.member.sequence_length
        positions = torch.arange(batch.tokens.shape[0], device=batch.tokens.device) % length
        return dropout_keys(seed, step, batch.sample_ids, positions)


def _parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def _resume(setting: Setting, engine: Any) -> Progress:
    folder = setting.folder / "checkpoints"
    progress, notes = find_checkpoint(folder, _layout(setting))
    if setting.is_first:
        for note in notes:
            print(note, flush=True)
    if progress is None:
        return Progress(0, 0)
    loaded, state = engine.load_checkpoint(str(folder), tag=str(progress.step))
    assert loaded is not None and state["step"] == progress.step, "a verified checkpoint loads"
    return progress


def _save(setting: Setting, engine: Any, progress: Progress) -> None:
    folder = setting.folder / "checkpoints"
    tag = folder / str(progress.step)
    if setting.is_first and tag.exists():
        shutil.rmtree(tag)
    _barrier(setting.processes)
    engine.save_checkpoint(
        str(folder), tag=str(progress.step), client_state={"step": progress.step, "samples": progress.samples}, save_latest=False
    )
    _barrier(setting.processes)
    if setting.is_first:
        complete_checkpoint(folder, progress, _layout(setting), setting.recipe.train.keep_checkpoints)


def _layout(setting: Setting) -> dict[str, Any]:
    """How DeepSpeed divides the state among files; a checkpoint loads only where it is the same."""
    return {
        "ranks": setting.processes.world_size,
        "zero_stage": setting.ds_config["zero_optimization"]["stage"],
        "precision": setting.recipe.train.precision,
    }


def _gather_fp32(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The optimiser's fp32 weights by name, one tensor at a time, on the CPU of the rank that keeps them. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        full = parameter.detach() if full is None else full
        if keep:
            gathered[name] = full.detach().to("cpu", torch.float32, copy=True)
    return gathered


def _export(setting: Setting, model: Decoder, parameters: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    reference = Decoder(model.config)
    reference.set_dropout(0.0, 0.0)
    missing, unexpected = reference.load_state_dict(parameters, strict=False)
    assert set(missing) <= {"head.weight"} and not unexpected, (missing, unexpected)  # a tied head is the embedding
    texts = sample_texts(setting.run, tokenizer)
    write_export(reference, setting.folder / "export", setting.recipe.export.dtype, setting.run.folder("tokenizer"), texts)


def sample_texts(run: RunFolder, tokenizer: Tokenizer, texts: int = 4, tokens: int = 64) -> list[list[int]]:
    """The beginnings of held-out documents in several languages, to compare logits on."""
    files = sorted((run.folder("corpus") / "valid").glob("*.jsonl"))
    documents = [document for file in files[:: max(1, len(files) // texts)] for document in islice(read_documents(file), 1)]
    if not documents:
        raise StageError(f"{run.folder('corpus')}/valid: no held-out text; make the corpus again: megaxelm run RECIPE --from corpus")
    return [[tokenizer.start_id, *ids[:tokens]] for ids in tokenizer.encode([document.text for document in documents])]


def _record_choices(setting: Setting, model: Decoder, backend: str, start: Progress) -> None:
    """What was chosen, once, on the console and with the run."""
    config, processes, member = setting.recipe.train, setting.processes, setting.member
    choices = {
        "processes": processes.world_size,
        "started_by": processes.found,
        "device": str(setting.device),
        "precision": config.precision,
        "zero_stage": setting.ds_config["zero_optimization"]["stage"],
        "attention": backend,
        "loss": f"chunks of {config.loss_chunk_rows} rows",
        "micro_batch_size": setting.ds_config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": setting.ds_config["gradient_accumulation_steps"],
        "parameters": sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()),
        "resumed_from_step": start.step,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(setting.folder / "choices.json", choices | {"deepspeed_config": setting.ds_config})
    print(f"{member.name}: " + ", ".join(f"{key} {value}" for key, value in choices.items()), flush=True)


def _sum_over_ranks(value: float, setting: Setting) -> float:
    if setting.processes.world_size == 1:
        return value
    total = torch.tensor(float(value), dtype=torch.float64, device=setting.device)
    dist.all_reduce(total)
    return float(total)


def _barrier(processes: Processes) -> None:
    if processes.world_size > 1:
        dist.barrier()
