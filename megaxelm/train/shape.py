"""The shape of the model that a recipe trains, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

from megaxelm.errors import ModelError, TokenizerError
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.recipe import Recipe


def model_shape(recipe: Recipe, vocab_size: int | None = None) -> DecoderConfig:
    """The decoder of a recipe: that of the seed which it loads, or of its `model` section and tokenizer. No weights are read.

    Args:
        vocab_size: pieces of the tokenizer; None: what the recipe says.

    Raises:
        ModelError, TokenizerError: the seed or the tokenizer cannot be looked at from here.
    """
    if recipe.seed.load is not None:
        return _seed_shape(recipe.seed.load)
    vocab_size = vocab_size or _vocab_size(recipe)
    return config_from_recipe(recipe.model, vocab_size, 0, 2, 1)


def _seed_shape(name: str) -> DecoderConfig:
    from megaxelm.model.hub import load_config

    folder = Path(name)
    if not folder.is_dir():
        folder = Path(_fetch(name, "config.json", ModelError(f"seed.load = {name}: no such folder, and its config.json cannot be fetched")))
        folder = folder.parent
    return load_config(folder)


def _vocab_size(recipe: Recipe) -> int:
    load = recipe.tokenizer.load
    if load is None:
        return recipe.tokenizer.vocab_size
    path = Path(load) / "tokenizer.json"
    cannot = TokenizerError(f"tokenizer.load = {load}: its tokenizer.json cannot be read from here; give --vocab-size")
    if not path.is_file():
        path = Path(_fetch(load, "tokenizer.json", cannot))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pieces = content["model"]["vocab"]
        ids = pieces.values() if isinstance(pieces, dict) else range(len(pieces))
        return max([*ids, *(token["id"] for token in content.get("added_tokens", []))]) + 1
    except (ValueError, KeyError, TypeError, OSError):
        raise cannot from None


def _fetch(name: str, file: str, cannot: Exception) -> str:
    """A small file of a repository on the Hugging Face hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(name, file)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise cannot from None
