"""Hugging Face checkpoint folders in and out of the decoder."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.adapter_files import WEIGHTS, base_folder, is_adapter, open_adapter
from megaxelm.model.config import DecoderConfig, num_parameters
from megaxelm.model.decoder import TABLES, Decoder, parameter_shapes
from megaxelm.model.families import get_family, hf_name
from megaxelm.model.source import WeightSource, decoder_source, streamed_logits
from megaxelm.model.weight_files import (
    DEFAULT_SHARD_BYTES,
    SAFETENSORS_INDEX,
    SINGLE_FILES,
    StoredTensor,
    read_json,
    safetensors_of,
    stored_tensors,
    write_safetensors,
)

TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "megaxelm_tokenizer.json",
)
# Largest difference of logits after a reload, as a share of the largest logit: fp32 summation order, or the rounding of bf16 weights.
_LOGIT_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Above this number of parameters transformers' own class, which holds the whole model, is not run.
_FOREIGN_PARAMETERS = 200_000_000


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder configuration of a checkpoint folder.

    Of an adapter it is that of its base.

    Raises:
        ModelError: no readable config.json, an unknown family, or something the decoder does not have.
    """
    if is_adapter(Path(folder)):
        return load_config(_locate(base_folder(Path(folder))))
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return get_family(raw.get("model_type")).config_from_hf(raw)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def load_pretrained(folder_or_name: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with the weights of a checkpoint folder, or of a name on the Hugging Face hub, in evaluation mode.

    Tensors are read one at a time: safetensors (single or sharded), else pytorch_model.bin without running its pickle.

    Raises:
        ModelError: the folder is incomplete or damaged, tensors are missing, unexpected or of another shape.
    """
    source = open_pretrained(folder_or_name)
    decoder = Decoder(source.config).to(dtype)
    for name, parameter in decoder.named_parameters():
        parameter.data.copy_(source.weight(name))
    return decoder.eval()


def open_pretrained(folder_or_name: str | Path) -> WeightSource:
    """The tensors of a checkpoint folder, or of a name on the Hugging Face hub, to be read one at a time.

    The folder may be an adapter of peft's: then they are those of its base with the deltas merged.

    Raises:
        ModelError: as `load_pretrained`; damage inside of a tensor's numbers when it is read.
    """
    folder = _locate(folder_or_name)
    if is_adapter(folder):
        return open_adapter(folder, open_pretrained)
    config = load_config(folder)
    family = get_family(config.family)
    stored = stored_tensors(folder)
    shapes = parameter_shapes(config)
    theirs = {name: hf_name(family, name) for name in shapes}
    tied_name = hf_name(family, "head.weight") if config.tie_embeddings else None
    ignored = [re.compile(pattern) for pattern in family.IGNORED]
    surplus = [name for name in stored if name not in theirs.values() and name != tied_name]
    unexpected = [name for name in surplus if not any(pattern.fullmatch(name) for pattern in ignored)]
    _refuse_names(str(folder), sorted(set(theirs.values()) - stored.keys()), unexpected)
    for name, shape in shapes.items():
        expected, found = _exported_shape(name, shape, config), stored[theirs[name]].shape
        if found != expected:
            raise ModelError(f"{folder}: {theirs[name]} has shape {found}, config.json asks for {expected}; they are not of one model")
    if tied_name in stored and not torch.equal(stored[tied_name].read(), stored[theirs["embed.weight"]].read()):
        raise ModelError(
            f"{folder}: tie_word_embeddings is true, but {tied_name} differs from the embedding; set it to false in config.json, "
            "or remove the tensor"
        )
    return WeightSource(config, lambda name: _padded(stored[theirs[name]], shapes[name]))


def _padded(stored: StoredTensor, shape: tuple[int, ...]) -> Tensor:
    tensor = stored.read()
    if tuple(tensor.shape) == shape:
        return tensor
    padded = torch.zeros(shape, dtype=tensor.dtype)
    padded[: tensor.shape[0]] = tensor
    return padded


def _exported_shape(name: str, shape: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
    """Shape in a checkpoint folder, which has no padding rows."""
    return (config.vocab_size, *shape[1:]) if name in TABLES else shape


def save_pretrained(
    model: Decoder | WeightSource | Mapping[str, Tensor],
    folder: str | Path,
    *,
    config: DecoderConfig | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer_folder: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint folder that `AutoModelForCausalLM.from_pretrained` loads, one tensor at a time.

    Args:
        model: a decoder, a source of weights, or a decoder's state dict (our names, padded rows) together with `config`.
        dtype: type of the weights in the files.
        tokenizer_folder: its tokenizer files are copied.
        max_shard_bytes: weights above this are cut into several files with an index.

    Raises:
        ModelError: tensors missing or not finite, a configuration that the family cannot express, no tokenizer files.
    """
    from transformers import GenerationConfig

    if isinstance(model, Decoder):
        source = decoder_source(model)
    elif isinstance(model, WeightSource):
        source = model
    elif config is None:
        raise TypeError("save_pretrained of a state dict needs config")
    else:
        source = _state_source(model, config)
    config = source.config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = get_family(config.family)
    hf = family.config_to_hf(config)
    hf.architectures = [family.ARCHITECTURE]
    hf.dtype = dtype
    hf.save_pretrained(folder)
    ids = {name: config.extra.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    _save_weights(source, folder, dtype, max_shard_bytes)
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)


def _state_source(state: Mapping[str, Tensor], config: DecoderConfig) -> WeightSource:
    expected = parameter_shapes(config)
    unknown = sorted(state.keys() - expected.keys() - ({"head.weight"} if config.tie_embeddings else set()))
    _refuse_names("export", sorted(expected.keys() - state.keys()), unknown)
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(f"export: {name} has shape {tuple(state[name].shape)}, the configuration asks for {shape}")
    return WeightSource(config, lambda name: state[name])


def _save_weights(source: WeightSource, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    config, family = source.config, get_family(source.config.family)
    shapes = {name: _exported_shape(name, shape, config) for name, shape in parameter_shapes(config).items()}
    ours = {hf_name(family, name): name for name in shapes}

    def read(theirs: str) -> Tensor:
        name = ours[theirs]
        tensor = source.weight(name)[: shapes[name][0]]
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"export: {name} has values that are not finite: training has diverged; go back to an earlier checkpoint")
        return tensor

    write_safetensors(folder, {theirs: shapes[name] for theirs, name in ours.items()}, dtype, read, max_shard_bytes)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of `source` into `folder`.

    Raises:
        ModelError: there are none.
    """
    files = {path for pattern in TOKENIZER_FILES for path in Path(source).glob(pattern) if path.is_file()}
    if not files:
        raise ModelError(f"{source}: no tokenizer files ({', '.join(TOKENIZER_FILES)}); give the folder that holds the tokenizer")
    for path in sorted(files):
        shutil.copyfile(path, folder / path.name)


def weights_hash(folder: str | Path) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a checkpoint folder; sharding does not change it.

    That of an adapter is over its scale, its tensors and the hash of its base.

    Raises:
        ModelError: the folder is incomplete or damaged.
    """
    folder, digest = Path(folder), hashlib.sha256()
    if is_adapter(folder):
        adapter = open_pretrained(folder).adapter
        assert adapter is not None
        digest.update(f"scale {adapter.lora.scale!r} base {weights_hash(_locate(base_folder(folder)))}\n".encode())
        tensors = safetensors_of(folder / WEIGHTS)
    else:
        tensors = stored_tensors(folder)
    for name, stored in sorted(tensors.items()):
        tensor = stored.read().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def compare_logits(folder: Path, source: WeightSource, texts_tokens: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[Tensor, float]:
    """Compare the logits of what was written in `dtype` with those of `source`, a layer at a time.

    Returns:
        The logits of what was written [tokens, vocab_size], and the largest difference as a share of the largest logit.

    Raises:
        ModelError: the logits differ by more than the rounding of the types explains.
    """
    ours, again = streamed_logits(source, texts_tokens), streamed_logits(open_pretrained(folder), texts_tokens)
    difference = float((ours - again).abs().max()) / max(1.0, float(ours.abs().max()))
    bound = max(_LOGIT_BOUNDS.get(kind, 3e-2) for kind in (dtype, source.weight("norm.weight").dtype))
    if not difference <= bound:
        raise ModelError(
            f"{folder}: the reloaded export differs by {difference:.2g} of the largest logit, allowed is {bound:.2g}; export again"
        )
    return again, difference


@torch.no_grad()
def check_export(folder: str | Path, model: Decoder | WeightSource, texts_tokens: Sequence[Sequence[int]]) -> float:
    """Reload an export with our reader and with transformers' own class and compare logits on these texts.

    Our side goes through the layers one at a time. A model of more than 200M parameters is not given to transformers' class, which would
    hold it whole; that is said.

    Returns:
        The largest difference to `model`, as a share of its largest logit.

    Raises:
        ModelError: the logits differ by more than the rounding of the types explains.
    """
    folder = Path(folder)
    source = decoder_source(model) if isinstance(model, Decoder) else model
    again, difference = compare_logits(folder, source, texts_tokens, _stored_dtype(folder))
    size = num_parameters(source.config)
    if size > _FOREIGN_PARAMETERS:
        print(
            f"{folder}: logits were compared layer by layer by our own reader, and not with transformers' class, which would hold all "
            f"{size / 1e6:.0f}M parameters at once (compare with: AutoModelForCausalLM.from_pretrained)",
            flush=True,
        )
        return difference
    foreign = float((again - _foreign_logits(folder, texts_tokens)).abs().max()) / max(1.0, float(again.abs().max()))
    if not foreign <= _LOGIT_BOUNDS[torch.float32]:
        raise ModelError(f"{folder}: transformers computes other logits from this export (by {foreign:.2g} of the largest); do not use it")
    return difference


def _foreign_logits(folder: Path, texts_tokens: Sequence[Sequence[int]]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return torch.cat([model(torch.tensor([list(text)])).logits[0] for text in texts_tokens])


def _locate(folder_or_name: str | Path) -> Path:
    path = Path(folder_or_name)
    if path.is_dir():
        return path
    name = str(folder_or_name)
    if isinstance(folder_or_name, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"model {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        has_safetensors = ["*.json", "*.safetensors", "*.model", "*.txt"]
        local = Path(snapshot_download(name, allow_patterns=has_safetensors))
        if not any((local / file).is_file() for file in (SINGLE_FILES[0], SAFETENSORS_INDEX)):
            local = Path(snapshot_download(name, allow_patterns=[*has_safetensors, "pytorch_model*.bin"]))
    except Exception as error:  # the client raises many kinds: no network, no such name, no access
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model {name}: neither a folder nor loadable from the Hugging Face hub ({reason})") from None
    return local


def _stored_dtype(folder: Path) -> torch.dtype:
    return next(iter(stored_tensors(folder).values())).dtype


def _refuse_names(where: str, missing: list[str], unexpected: list[str]) -> None:
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            problems.append(f"{kind} tensors: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
    if problems:
        raise ModelError(f"{where}: {'; '.join(problems)}; configuration and weights are not of one model, or the file is incomplete")
