"""A model at its start and the DeepSpeed engine around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ModelError
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained
from megaxelm.train.fill import fill_engine as fill_engine
from megaxelm.train.setting import Setting


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


def start_engine(setting: Setting, model: Decoder) -> Any:
    """DeepSpeed's engine around `model`, which holds its first weights. Collective."""
    import deepspeed

    groups = _parameter_groups(model, setting.recipe.train.weight_decay)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=setting.ds_config)
    return engine


def _parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not. Under ZeRO-3 a parameter itself is empty, and its shape is in `ds_shape`."""
    matrices = [parameter for parameter in model.parameters() if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    vectors = [parameter for parameter in model.parameters() if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])
