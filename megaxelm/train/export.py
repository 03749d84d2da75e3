"""Hugging Face exports of what was trained."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from megaxelm.corpus.prepare import read_documents
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import StageError
from megaxelm.model.decoder import Decoder
from megaxelm.model.export import write_export
from megaxelm.run import RunFolder
from megaxelm.train.engine import build_model
from megaxelm.train.setting import Setting, barrier


def export_seed(setting: Setting) -> None:
    """A loaded seed is trained no further: its export is the same model with the run's tokenizer. Rank 0 does it."""
    if not setting.is_first:
        return
    tokenizer = Tokenizer.load(setting.run.folder("tokenizer"))
    model = build_model(setting, tokenizer)
    _export(setting, model, dict(model.named_parameters()), tokenizer)


def export_trained(setting: Setting, engine: Any, tokenizer: Tokenizer) -> None:
    """Write the export of a model whose last checkpoint is complete. Collective."""
    parameters = _gather_fp32(engine.module, setting.is_first)
    if setting.is_first:
        _export(setting, engine.module, parameters, tokenizer)
    barrier(setting.processes)


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
