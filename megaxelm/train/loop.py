"""Train one model with DeepSpeed: build, resume, step, save, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megaxelm.corpus.index_folder import load_index_manifest, open_streams
from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import TrainError
from megaxelm.files import write_json
from megaxelm.model.decoder import Decoder
from megaxelm.train.checkpoint import Checkpoints, Layout, Progress
from megaxelm.train.engine import build_model, fill_engine, start_engine, starting_weights
from megaxelm.train.export import export_trained
from megaxelm.train.members import Member, check_language_weights
from megaxelm.train.metrics import Metrics
from megaxelm.train.setting import Setting, sum_over_ranks
from megaxelm.train.steps import Steps
from megaxelm_kernels.attention import choose_backend


def train(setting: Setting, progress_bar: Callable[[Member, int], Iterable[int]]) -> None:
    """Train to the last step, resuming from the newest complete checkpoint, and export. Runs on every rank.

    Args:
        progress_bar: steps from the given one on, with a bar; used on rank 0.
    """
    recipe, member = setting.recipe, setting.member
    config = recipe.train
    tokenizer = Tokenizer.load(setting.run.folder("tokenizer"))
    index = setting.run.folder("index")
    streams = open_streams(index, member.clusters, tokenizer)
    check_language_weights(recipe, {language for languages in load_index_manifest(index)["clusters"].values() for language in languages})
    sample_seed = member.sample_seed(config.seed)
    blend = Blend(streams, member.sequence_length, member.language_alpha, sample_seed, config.language_weights)
    source = starting_weights(setting, tokenizer)
    model = build_model(setting, source.config)
    try:
        # The packed kernel of torch has no fp32 form.
        wanted = "sdpa" if config.attention == "auto" and config.precision == "fp32" else config.attention
        backend = choose_backend(wanted, setting.device, model.config.attention_dropout)
    except ValueError as error:
        raise TrainError(f"train.attention = {config.attention}: {error}") from None
    every = config.activation_checkpointing
    model.enable_activation_checkpointing(every if isinstance(every, int) else int(every == "full"))
    options = {"attention": backend, "loss_chunk_rows": config.loss_chunk_rows}
    engine = start_engine(setting, model)
    checkpoints = _checkpoints(setting)
    start = checkpoints.resume(engine)
    if start.step == 0:
        fill_engine(engine, source.weight, None, 0)
    if setting.is_first:
        _record_choices(setting, model, backend, start)
    metrics = Metrics(setting.folder, start.step) if setting.is_first else None
    bar = progress_bar(member, start.step) if setting.is_first else range(start.step, member.steps)
    steps = Steps(setting, engine, blend, options)
    _loop(setting, steps, checkpoints, metrics, bar)
    checkpoints.finish()
    export_trained(setting, tokenizer)
    if metrics is not None:
        metrics.close()


def _loop(setting: Setting, steps: Steps, checkpoints: Checkpoints, metrics: Metrics | None, bar: Iterable[int]) -> None:
    member, config = setting.member, setting.recipe.train
    loss_sum, targets, tokens, began, since = 0.0, 0, 0, time.monotonic(), time.monotonic()
    for step in bar:
        result = steps.run(step)
        loss_sum, targets, tokens = loss_sum + result.loss_sum, targets + result.targets, tokens + result.tokens
        done = step + 1
        if done % config.log_every == 0 or done == member.steps:
            loss = sum_over_ranks(loss_sum, setting) / max(1, targets)
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
            checkpoints.save(steps.engine, Progress(done, done * member.batch_sequences))


def _checkpoints(setting: Setting) -> Checkpoints:
    config, stage = setting.recipe.train, setting.ds_config["zero_optimization"]["stage"]
    return Checkpoints(
        setting.folder / "checkpoints",
        Layout(setting.processes.world_size, stage, config.precision),
        setting.processes,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
        asynchronous=config.async_checkpoints,
    )


def language_tokens(blend: Blend, samples: int) -> dict[str, int]:
    """Tokens of each language among the first `samples` samples of a run: by arithmetic, so the same after a resume and on any ranks."""
    return {language: count * blend.sequence_length for language, count in sorted(blend.counts(samples).items())}


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
