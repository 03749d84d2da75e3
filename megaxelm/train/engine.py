"""A model at its start and the DeepSpeed engine around it.

    source = starting_weights(setting, tokenizer)
    model = build_model(setting, source.config)
    engine = start_engine(setting, model)
    fill_engine(engine, source.weight, None, 0)

The model is built empty; under ZeRO-3 each rank then holds its share of it from the start. The engine is filled tensor by tensor
afterwards, so its fp32 weights are those of the source in every stage and precision.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig, config_from_recipe, write_config
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import open_pretrained
from megaxelm.model.memory import large_blocks_apart
from megaxelm.model.source import WeightSource, drawn_source
from megaxelm.train.fill import fill_engine
from megaxelm.train.setting import Setting

__all__ = ["build_model", "fill_engine", "start_engine", "starting_weights"]

MODEL_CONFIG = "model_config.json"


def starting_weights(setting: Setting, tokenizer: Tokenizer) -> WeightSource:
    """The weights that training starts from, with the recipe's dropout: the parent's export, a loaded seed, or fresh ones.

    Raises:
        TokenizerError or ModelError: the loaded seed does not fit the tokenizer or the sequence length.
    """
    recipe, member = setting.recipe, setting.member
    if member.parent is not None:
        source = open_pretrained(setting.run.expert(member.parent) / "export")
    elif recipe.seed.load is not None:
        source = open_pretrained(recipe.seed.load)
        _check_tokenizer_of_seed(recipe.seed.load, source.config, tokenizer)
    else:
        config = config_from_recipe(recipe.model, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.pad_token_id)
        source = drawn_source(config, recipe.train.seed)
    if member.sequence_length > source.config.max_positions:
        raise ModelError(
            f"train.sequence_length = {member.sequence_length} is longer than the {source.config.max_positions} positions of the seed: "
            "shorten it"
        )
    config = replace(source.config, residual_dropout=recipe.model.dropout, attention_dropout=recipe.model.attention_dropout)
    return replace(source, config=config)


def build_model(setting: Setting, config: DecoderConfig) -> Decoder:
    """The model, not yet filled, in training mode; under ZeRO-3 each rank holds its share alone. Collective."""
    import deepspeed

    in_parts = setting.ds_config["zero_optimization"]["stage"] == 3
    if not in_parts:
        return Decoder(config).train()
    with large_blocks_apart(), deepspeed.zero.Init(config_dict_or_path=setting.ds_config):
        return Decoder(config).train()


def _check_tokenizer_of_seed(seed: str, config: DecoderConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"seed.load = {seed}: its vocabulary has {config.vocab_size} entries, the tokenizer {tokenizer.vocab_size}: "
            "set tokenizer.load to the tokenizer of the seed"
        )
    if (Path(seed) / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        if AutoTokenizer.from_pretrained(seed).get_vocab() != tokenizer.hf.get_vocab():
            raise ModelError(f"seed.load = {seed}: its tokenizer has other pieces than the run's: set tokenizer.load = {seed}")


def start_engine(setting: Setting, model: Decoder) -> Any:
    """DeepSpeed's engine around `model`, to be filled or resumed; the model's configuration is left beside the checkpoints. Collective."""
    import deepspeed

    if setting.is_first:
        write_config(model.config, setting.folder / MODEL_CONFIG)
    groups = _parameter_groups(model, setting.recipe.train.weight_decay)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=setting.ds_config)
    return engine


def _parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not. Under ZeRO-3 a parameter itself is empty, and its shape is in `ds_shape`."""
    matrices = [parameter for parameter in model.parameters() if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    vectors = [parameter for parameter in model.parameters() if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])
