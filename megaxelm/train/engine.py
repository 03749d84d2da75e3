"""A model at its start and the DeepSpeed engine around it.

    source = starting_weights(setting, tokenizer)
    model = build_model(setting, source.config)
    engine = start_engine(setting, model)
    fill_engine(engine, source.weight, None, 0)

The model is built empty; under ZeRO-3 each rank then holds its share of it from the start. The engine is filled tensor by tensor
afterwards, so its fp32 weights are those of the source in every stage and precision.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import CheckpointError, ModelError, StageError
from megaxelm.files import read_json, write_json
from megaxelm.model.config import DecoderConfig, config_from_recipe, write_config
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import open_pretrained
from megaxelm.model.lora import add_lora, lora_from_recipe, start_lora
from megaxelm.model.memory import large_blocks_apart
from megaxelm.model.source import Adapter, Lora, WeightSource, drawn_source
from megaxelm.train.fill import fill_engine, fill_frozen
from megaxelm.train.members import lora_settings
from megaxelm.train.setting import Setting

__all__ = ["build_model", "fill_engine", "fill_frozen", "start_engine", "starting_weights"]

MODEL_CONFIG = "model_config.json"
LORA_CONFIG = "lora.json"


def starting_weights(setting: Setting, tokenizer: Tokenizer) -> WeightSource:
    """The weights that training starts from, with the recipe's dropout: the parent's export, a loaded seed, or fresh ones.

    Where the member is trained as low-rank deltas (`experts.kind: lora`) the source has them apart in `adapter`.

    Raises:
        TokenizerError or ModelError: the loaded seed does not fit the tokenizer or the sequence length.
    """
    recipe, member = setting.recipe, setting.member
    lora = lora_settings(recipe, member)
    if member.parent is not None:
        parent = setting.run.expert(member.parent) / "export"
        source = open_pretrained(parent)
        if lora is not None:
            source = start_lora(source, parent, lora_from_recipe(lora, source.config), recipe.train.seed)
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
    return replace(source, config=config, adapter=None if lora is None else source.adapter)


def build_model(setting: Setting, config: DecoderConfig, lora: Lora | None = None) -> Decoder:
    """The model, not yet filled, in training mode; under ZeRO-3 each rank holds its share alone. With `lora` only deltas are trained.
    Collective."""
    import deepspeed

    in_parts = setting.ds_config["zero_optimization"]["stage"] == 3
    if not in_parts:
        return _build(config, lora)
    with large_blocks_apart(), deepspeed.zero.Init(config_dict_or_path=setting.ds_config):
        return _build(config, lora)


def _build(config: DecoderConfig, lora: Lora | None) -> Decoder:
    decoder = Decoder(config)
    if lora is not None:
        add_lora(decoder, lora)
    return decoder.train()


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


def start_engine(setting: Setting, model: Decoder, adapter: Adapter | None = None) -> Any:
    """DeepSpeed's engine around `model`, to be filled or resumed; what the model is, is left beside the checkpoints. Collective.

    Args:
        adapter: of a model that is trained as low-rank deltas. Its checkpoints hold these alone.
    """
    import deepspeed

    if setting.is_first:
        write_config(model.config, setting.folder / MODEL_CONFIG)
        if adapter is not None:
            base = os.path.relpath(adapter.folder.absolute(), setting.folder.absolute())
            write_json(setting.folder / LORA_CONFIG, {"lora": asdict(adapter.lora), "base": base})
    if adapter is not None:
        model.register_state_dict_post_hook(_without_frozen)
    groups = _parameter_groups(model, setting.recipe.train.weight_decay)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=setting.ds_config)
    return engine


def read_lora(folder: Path) -> tuple[Lora, Path] | None:
    """What `start_engine` left in an expert's folder of its deltas, and the folder of their base; None where it has weights of its own.

    Raises:
        CheckpointError: damaged.
    """
    path = folder / LORA_CONFIG
    if not path.exists():
        return None
    try:
        note = read_json(path, lora=dict, base=str)
        return Lora(**note["lora"] | {"targets": tuple(note["lora"]["targets"])}), Path(os.path.normpath(folder / note["base"]))
    except (StageError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the folder of the expert again") from None


def _without_frozen(model: Decoder, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave out of a state what is not trained. DeepSpeed's own way to do so keeps a tied head, which is frozen under another name."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not. Under ZeRO-3 a parameter itself is empty, and its shape is in `ds_shape`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    vectors = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])
