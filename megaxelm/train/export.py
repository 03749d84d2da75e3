"""Hugging Face exports of what was trained, made from a checkpoint on disk by one process.

A checkpoint of any ZeRO stage and number of ranks is read tensor by tensor, so neither a GPU nor the old ranks nor room for the model
is needed.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from megaxelm.corpus.prepare import read_documents
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import CheckpointError, StageError
from megaxelm.model.adapter_files import write_adapter
from megaxelm.model.config import read_config
from megaxelm.model.decoder import parameter_shapes
from megaxelm.model.export import export_to, write_export
from megaxelm.model.hub import open_pretrained
from megaxelm.model.lora import adapted_source, lora_shapes
from megaxelm.model.source import WeightSource
from megaxelm.run import RunFolder
from megaxelm.train.checkpoint_folder import verified
from megaxelm.train.engine import MODEL_CONFIG, read_lora, starting_weights
from megaxelm.train.setting import Setting, barrier
from megaxelm.train.zero_state import CheckpointState

_CHECKPOINTS = "checkpoints"


def export_seed(setting: Setting) -> None:
    """A loaded seed is trained no further: its export is the same model with the run's tokenizer. Rank 0 does it."""
    if setting.is_first:
        tokenizer = Tokenizer.load(setting.run.folder("tokenizer"))
        _write(setting, starting_weights(setting, tokenizer), tokenizer)


def export_trained(setting: Setting, tokenizer: Tokenizer) -> None:
    """Write the export of a model whose last checkpoint is complete. Collective; rank 0 does it."""
    if setting.is_first:
        _write(setting, open_checkpoint(_newest(setting.folder / _CHECKPOINTS)), tokenizer)
    barrier(setting.processes)


def _write(setting: Setting, source: WeightSource, tokenizer: Tokenizer) -> None:
    texts = sample_texts(setting.run, tokenizer, source.config.max_positions)
    write = write_export if source.adapter is None else write_adapter
    write(source, setting.folder / "export", setting.recipe.export.dtype, setting.run.folder("tokenizer"), texts)


def is_checkpoint_path(path: Path) -> bool:
    """Whether a user means a checkpoint: `.../checkpoints/<step>`, or `.../checkpoints` for the newest one."""
    path = path.absolute()
    return _CHECKPOINTS in (path.name, path.parent.name)


def export_checkpoint_folder(path: Path, output: Path, dtype: str, to: str = "hf") -> Path:
    """Write a checkpoint of a run as a Hugging Face folder with the run's tokenizer, and compare logits.

    Args:
        path: `runs/<run>/experts/<name>/checkpoints/<step>`, or the folder of the checkpoints for the newest one.

    Returns:
        The folder of the checkpoint that was taken.

    Raises:
        CheckpointError: no such checkpoint, an unfinished or damaged one.
        ModelError: `output` exists, or the written logits differ.
    """
    path = path.absolute()
    tag = _newest(path) if path.name == _CHECKPOINTS else path
    _check_complete(tag)
    run = RunFolder(tag.parents[3])
    tokenizer_folder = run.folder("tokenizer")
    tokenizer = Tokenizer.load(tokenizer_folder)
    source = open_checkpoint(tag)
    export_to(source, output, dtype, tokenizer_folder, sample_texts(run, tokenizer, source.config.max_positions), to)
    return tag


def open_checkpoint(tag: Path) -> WeightSource:
    """The fp32 weights of a checkpoint folder of a run, with the configuration that its training left beside the checkpoints.

    Of low-rank deltas the source has them apart in `adapter`; their base must lie where it did.

    Raises:
        CheckpointError: not readable, or not of that configuration.
        ModelError: no configuration beside the checkpoints.
    """
    state = CheckpointState.open(tag)
    config = read_config(tag.parents[1] / MODEL_CONFIG)
    deltas = read_lora(tag.parents[1])
    shapes = parameter_shapes(config) if deltas is None else lora_shapes(config, deltas[0])
    found = {name: state.shape(name) for name in state.names}
    if found != shapes:
        other = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise CheckpointError(
            f"{tag}: {other[0]} has shape {found.get(other[0])}, {MODEL_CONFIG} asks for {shapes.get(other[0])}; checkpoint and "
            "configuration are not of one training"
        )
    if deltas is None:
        return WeightSource(config, state.weight)
    lora, base = deltas
    return adapted_source(open_pretrained(base), lora, state.weight, base)


def _newest(checkpoints: Path) -> Path:
    try:
        return checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoints}: no complete checkpoint there (no `latest`); train up to one first") from None


def _check_complete(tag: Path) -> None:
    """Whether the checkpoint's marker is there and its files are those that were written."""
    if not tag.is_dir():
        steps = sorted((folder.name for folder in tag.parent.glob("[0-9]*")), key=lambda name: (len(name), name))
        raise CheckpointError(f"{tag}: no such checkpoint; there are: {', '.join(steps) or 'none'}")
    if not (tag / "complete.json").exists():
        raise CheckpointError(f"{tag}: unfinished (no complete.json), its saving was interrupted; take an earlier checkpoint")
    verified(tag)


def sample_texts(run: RunFolder, tokenizer: Tokenizer, max_positions: int, texts: int = 4, tokens: int = 64) -> list[list[int]]:
    """The beginnings of held-out documents in several languages, to compare logits on: at most `tokens` and what the model can read."""
    files = sorted((run.folder("corpus") / "valid").glob("*.jsonl"))
    documents = [document for file in files[:: max(1, len(files) // texts)] for document in islice(read_documents(file), 1)]
    if not documents:
        raise StageError(f"{run.folder('corpus')}/valid: no held-out text; make the corpus again: megaxelm run RECIPE --from corpus")
    return [[tokenizer.start_id, *ids][: min(tokens, max_positions)] for ids in tokenizer.encode([document.text for document in documents])]
