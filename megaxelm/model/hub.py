"""Hugging Face checkpoint folders in and out of the decoder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder
from megaxelm.model.families import Family, get_family, hf_name

DEFAULT_SHARD_BYTES = 5_000_000_000
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
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
# Largest difference of logits after a reload, as a share of the largest logit: fp32 summation order, or the rounding of bf16 weights.
_LOGIT_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder configuration of a checkpoint folder.

    Raises:
        ModelError: no readable config.json, an unknown family, or something the decoder does not have.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
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
    folder = _locate(folder_or_name)
    config = load_config(folder)
    family = get_family(config.family)
    decoder = Decoder(config).to(dtype)
    wanted = {hf_name(family, name): parameter.data for name, parameter in decoder.named_parameters()}
    ignored = [re.compile(pattern) for pattern in family.IGNORED]
    tied_name = hf_name(family, "head.weight") if config.tie_embeddings else None
    tied: Tensor | None = None
    found: set[str] = set()
    unexpected: list[str] = []
    for name, read in _tensors(folder):
        if name in wanted:
            _fill(wanted[name], read(), name, config, folder)
            found.add(name)
        elif name == tied_name:
            tied = read()
        elif not any(pattern.fullmatch(name) for pattern in ignored):
            unexpected.append(name)
    missing = sorted(wanted.keys() - found)
    _refuse_names(str(folder), missing, unexpected)
    if tied is not None and not torch.equal(tied.to(dtype), decoder.embed.weight.data[: config.vocab_size]):
        raise ModelError(
            f"{folder}: tie_word_embeddings is true, but {tied_name} differs from the embedding; set it to false in config.json, "
            "or remove the tensor"
        )
    return decoder.eval()


def save_pretrained(
    model: Decoder | Mapping[str, Tensor],
    folder: str | Path,
    *,
    config: DecoderConfig | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer_folder: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        model: a decoder, or its state dict (our names, padded rows) together with `config`.
        dtype: type of the weights in the files.
        tokenizer_folder: its tokenizer files are copied.
        max_shard_bytes: weights above this are cut into several files with an index.

    Raises:
        ModelError: tensors missing or not finite, a configuration that the family cannot express, no tokenizer files.
    """
    from transformers import GenerationConfig

    if isinstance(model, Decoder):
        config, state = model.config, dict(model.state_dict())
    elif config is None:
        raise TypeError("save_pretrained of a state dict needs config")
    else:
        state = dict(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = get_family(config.family)
    hf = family.config_to_hf(config)
    hf.architectures = [family.ARCHITECTURE]
    hf.dtype = dtype
    hf.save_pretrained(folder)
    ids = {name: config.extra.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    _save_weights(state, folder, config, family, dtype, max_shard_bytes)
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)


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

    Raises:
        ModelError: the folder is incomplete or damaged.
    """
    digest = hashlib.sha256()
    for name, read in sorted(_tensors(Path(folder)), key=lambda item: item[0]):
        tensor = read().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def check_export(folder: str | Path, decoder: Decoder, texts_tokens: Sequence[Sequence[int]]) -> float:
    """Reload an export with our reader and with transformers' own class and compare logits on these texts.

    Returns:
        The largest difference to `decoder`, as a share of its largest logit.

    Raises:
        ModelError: the logits differ by more than the rounding of the types explains.
    """
    from transformers import AutoModelForCausalLM

    lengths = [len(text) for text in texts_tokens]
    tokens = torch.tensor([token for text in texts_tokens for token in text], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def packed_logits(model: Decoder) -> Tensor:
        training = model.training
        model.eval()
        device = model.device
        logits = model.logits(model(tokens.to(device), positions.to(device), cu_seqlens)).float().cpu()
        model.train(training)
        return logits

    stored = _stored_dtype(Path(folder))
    reloaded = load_pretrained(folder)
    ours, again = packed_logits(decoder), packed_logits(reloaded)
    del reloaded
    theirs_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = torch.cat([theirs_model(torch.tensor([list(text)])).logits[0] for text in texts_tokens])
    scale = max(1.0, float(ours.abs().max()))
    difference = float((ours - again).abs().max()) / scale
    bound = max(_LOGIT_BOUNDS.get(stored, 3e-2), _LOGIT_BOUNDS.get(decoder.dtype, 3e-2))
    if not difference <= bound:
        raise ModelError(
            f"{folder}: the reloaded export differs by {difference:.2g} of the largest logit, allowed is {bound:.2g}; export again"
        )
    foreign = float((again - theirs).abs().max()) / scale
    if not foreign <= _LOGIT_BOUNDS[torch.float32]:
        raise ModelError(f"{folder}: transformers computes other logits from this export (by {foreign:.2g} of the largest); do not use it")
    return difference


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
        if not any((local / file).is_file() for file in (_SINGLE[0], _INDEXES[0])):
            local = Path(snapshot_download(name, allow_patterns=[*has_safetensors, "pytorch_model*.bin"]))
    except Exception as error:  # the client raises many kinds: no network, no such name, no access
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model {name}: neither a folder nor loadable from the Hugging Face hub ({reason})") from None
    return local


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a checkpoint folder holds config.json and weights") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); the checkpoint is damaged, copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for single, index in zip(_SINGLE, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            weight_map = _read_json(folder / index).get("weight_map")
            named = [str(file) for file in weight_map.values()] if isinstance(weight_map, dict) else []
            if not named or any(Path(file).name != file for file in named):
                raise ModelError(f"{folder / index}: weight_map is missing or names no files of this folder; copy the checkpoint again")
            files = [folder / file for file in sorted(set(named))]
            absent = [path.name for path in files if not path.is_file()]
            if absent:
                raise ModelError(f"{folder}: the index names files that are not there: {', '.join(absent)}; copy the checkpoint again")
            return files
    raise ModelError(f"{folder}: no weights; expected one of {', '.join((*_SINGLE, *_INDEXES))}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Errors of a reader become one ModelError that names the file."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # safetensors, zipfile and unpickler each have their own kinds; all mean the file is damaged
        raise ModelError(f"{path}: truncated or damaged ({type(error).__name__}: {error}); copy it again") from None


def _tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and reader of each tensor of a folder; nothing is read until the reader is called."""
    from safetensors import safe_open

    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            with _damage_named(path):
                file = safe_open(path, framework="pt", device="cpu")
                names = list(file.keys())
            for name in names:
                yield name, _reader(path, lambda file=file, name=name: file.get_tensor(name))  # type: ignore[misc]
        else:
            with _damage_named(path):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            for name, tensor in state.items():
                yield name, lambda tensor=tensor: tensor  # type: ignore[misc]


def _reader(path: Path, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def guarded() -> Tensor:
        with _damage_named(path):
            return read()

    return guarded


def _stored_dtype(folder: Path) -> torch.dtype:
    return next(_tensors(folder))[1]().dtype


def _is_table(name: str, family: Family) -> bool:
    return name in (hf_name(family, "embed.weight"), hf_name(family, "head.weight"))


def _fill(target: Tensor, tensor: Tensor, name: str, config: DecoderConfig, folder: Path) -> None:
    rows = config.vocab_size if _is_table(name, get_family(config.family)) else target.shape[0]
    expected = (rows, *target.shape[1:])
    if tuple(tensor.shape) != expected:
        raise ModelError(f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json asks for {expected}; they are not of one model")
    target[:rows].copy_(tensor)


def _refuse_names(where: str, missing: list[str], unexpected: list[str]) -> None:
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            problems.append(f"{kind} tensors: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
    if problems:
        raise ModelError(f"{where}: {'; '.join(problems)}; configuration and weights are not of one model, or the file is incomplete")


def _save_weights(
    state: dict[str, Tensor], folder: Path, config: DecoderConfig, family: Family, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    from safetensors.torch import save_file

    with torch.device("meta"):
        expected = {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}
    unknown = sorted(state.keys() - expected.keys() - ({"head.weight"} if config.tie_embeddings else set()))
    absent = sorted(expected.keys() - state.keys())
    _refuse_names("export", absent, unknown)
    shards: list[list[str]] = [[]]
    size, total = 0, 0
    item = torch.empty((), dtype=dtype).element_size()
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(f"export: {name} has shape {tuple(state[name].shape)}, the configuration asks for {shape}")
        rows = config.vocab_size if name in ("embed.weight", "head.weight") else shape[0]
        nbytes = item * rows * (state[name].numel() // shape[0])
        if size and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = state[name].detach()
            if name in ("embed.weight", "head.weight"):
                tensor = tensor[: config.vocab_size]
            tensor = tensor.to(device="cpu", dtype=dtype).contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"export: {name} has values that are not finite: training has diverged; go back to an earlier checkpoint")
            tensors[hf_name(family, name)] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
