"""Every key of a DeepSpeed configuration, nested ones too: misspelt, removed and deprecated keys and values of a wrong type are errors.

DeepSpeed itself ignores an unknown key at the top level in silence, and in each section that it reads without a model. Where it has a
model (pydantic) of a section, names and types come from that; the other sections are in the tables here.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megaxelm.errors import TrainError

_Types = tuple[type, ...]
_NUMBER: _Types = (int, float)

# Keys at the top level that hold one value.
_VALUES: dict[str, _Types] = {
    "communication_data_type": (str,),
    "dataloader_drop_last": (bool,),
    "disable_allgather": (bool,),
    "disable_python_gc": (bool,),
    "dump_state": (bool,),
    "gradient_accumulation_steps": (int,),
    "gradient_allreduce_op": (str,),
    "gradient_clipping": _NUMBER,
    "gradient_predivide_factor": _NUMBER,
    "log_level": (str,),
    "managed_gradient_accumulation": (bool,),
    "memory_breakdown": (bool,),
    "prescale_gradients": (bool,),
    "seq_parallel_communication_data_type": (str,),
    "steps_per_print": (int,),
    "train_batch_size": (int,),
    "train_micro_batch_size_per_gpu": (int,),
    "use_data_before_expert_parallelism": (bool,),
    "vocabulary_size": (int,),
    "wall_clock_breakdown": (bool,),
    "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,),
}

# Sections that DeepSpeed reads without a model. A nested table is a section within.
_SECTIONS: dict[str, dict[str, Any]] = {
    "activation_checkpointing": {
        "partition_activations": (bool,),
        "contiguous_memory_optimization": (bool,),
        "cpu_checkpointing": (bool,),
        "number_checkpoints": (int, type(None)),
        "synchronize_checkpoint_boundary": (bool,),
        "profile": (bool,),
    },
    "aio": {
        "block_size": (int,),
        "queue_depth": (int,),
        "intra_op_parallelism": (int,),
        "single_submit": (bool,),
        "overlap_events": (bool,),
        "use_gds": (bool,),
    },
    "checkpoint": {
        "tag_validation": (str,),
        "checkpoint_serialization": (bool,),
        "load_universal": (bool,),
        "use_node_local_storage": (bool,),
        "parallel_write": {"pipeline_stage": (bool,)},
        "writer": {
            "type": (str,),
            "io_buffer_size": (int,),
            "io_buffer_double": (bool,),
            "io_multiplier": (int,),
            "show_statistics": (bool,),
            "data_parallel": (str, type(None)),
            "decoupled": (bool,),
        },
    },
    "data_types": {
        "grad_accum_dtype": (str, type(None)),
        "param_dtype": (str, type(None)),
        "buffer_dtype": (str, type(None)),
        "keep_in_fp32_modules": (str, list),
    },
    "flops_profiler": {
        "enabled": (bool,),
        "recompute_fwd_factor": _NUMBER,
        "profile_step": (int,),
        "module_depth": (int,),
        "top_modules": (int,),
        "detailed": (bool,),
        "output_file": (str, type(None)),
    },
    "optimizer": {
        "type": (str,),
        "legacy_fusion": (bool,),
        "params": {
            "lr": _NUMBER,
            "betas": (list,),
            "eps": _NUMBER,
            "weight_decay": _NUMBER,
            "torch_adam": (bool,),
            "adam_w_mode": (bool,),
            "foreach": (bool, type(None)),
            "fp32_optimizer_states": (bool,),
        },
    },
}

# Sections with a model in DeepSpeed: where it is.
_MODELS = {
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "comet": ("deepspeed.monitor.config", "CometConfig"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
    "csv_monitor": ("deepspeed.monitor.config", "CSVConfig"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "tensorboard": ("deepspeed.monitor.config", "TensorBoardConfig"),
    "wandb": ("deepspeed.monitor.config", "WandbConfig"),
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
}

# What DeepSpeed has, and a training of ours has no use for: why.
UNUSED = {
    "autotuning": "measure with `megaxelm bench train` instead",
    "data_efficiency": "the samples and their order are the recipe's (train.language_alpha, train.language_weights, train.seed)",
    "data_parallel_size": "how many ranks share a sequence is the recipe's (train.sequence_parallel)",
    "datastates_ckpt": "checkpoints are written by the trainer (train.async_checkpoints)",
    "expert_parallel": "it is for mixtures of experts within a layer, which the decoder has not",
    "hybrid_engine": "it is for reinforcement learning",
    "pipeline": "the decoder is not a pipeline module",
    "scheduler": "the learning rate is the recipe's (train.schedule)",
    "sequence_parallel_size": "how many ranks share a sequence is the recipe's (train.sequence_parallel)",
    "tensor_parallel": "AutoTP's checkpoints cannot be carried over or exported; take ZeRO-3, or train.sequence_parallel for long contexts",
    "torch_autocast": "the precision is the recipe's (train.precision)",
    "weight_quantization": "it is for inference",
}

_REMOVED = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)
_REMOVED_ZERO = ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")


def check_keys(config: Mapping[str, Any], path: Path) -> None:
    """Look at every key, and at the type of every value that is not `"auto"`. Imports DeepSpeed, which takes seconds, after the top level.

    Raises:
        TrainError: the first key that is wrong, with its place in the file and the name it is nearest to.
    """
    known = {*_VALUES, *_SECTIONS, *_MODELS, *UNUSED, "timers"}
    for key, value in config.items():
        if key in _REMOVED:
            raise TrainError(f"{path}: `{key}` was removed from DeepSpeed and would be ignored: take it out")
        if key == "bfloat16":
            raise TrainError(f"{path}: `bfloat16` is an old name: write `bf16`")
        _known(key, known, "", path)
        if key in _VALUES:
            _check_type(value, _VALUES[key], key, path)
    for key, table in _SECTIONS.items():
        if key in config:
            _check_table(config[key], table, key, path)
    with _quiet():
        for key in _MODELS:
            if key in config:
                _check_model(_section(config[key], key, path), _model(*_MODELS[key]), key, path)
        if "timers" in config:
            timers = _section(config["timers"], "timers", path)
            for key in timers:
                _known(key, ("throughput",), "timers", path)
            throughput = _section(timers.get("throughput", {}), "timers.throughput", path)
            _check_model(throughput, _model("deepspeed.utils.config", "DeepSpeedThroughputTimerConfig"), "timers.throughput", path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs which accelerator it found when it is imported, which is nothing to tell while a file is looked at."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _model(module: str, name: str) -> type[BaseModel]:
    import importlib

    return getattr(importlib.import_module(module), name)


def _known(key: str, known: Collection[str], section: str, path: Path) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, sorted(known), n=1)
    where = f" in `{section}`" if section else ""
    raise TrainError(f"{path}: DeepSpeed has no key `{key}`{where}" + (f"; did you mean `{near[0]}`?" if near else ""))


def _section(value: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TrainError(f"{path}: {name} = {value!r} must be a section: {{...}}")
    return value


def _check_type(value: Any, types: _Types, name: str, path: Path) -> None:
    if value == "auto":
        return
    whole = int in types and float not in types and isinstance(value, float) and value.is_integer()  # 5e8 is how people write it
    if (isinstance(value, bool) and bool not in types) or not (isinstance(value, types) or whole):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", type(None): "null"}
        expected = "a number" if types == _NUMBER else " or ".join(words[kind] for kind in types)
        raise TrainError(f"{path}: {name} = {value!r} must be {expected}")


def _check_table(section: Any, table: Mapping[str, Any], name: str, path: Path) -> None:
    for key, value in _section(section, name, path).items():
        _known(key, table, name, path)
        if isinstance(table[key], dict):
            _check_table(value, table[key], f"{name}.{key}", path)
        else:
            _check_type(value, table[key], f"{name}.{key}", path)


def _check_model(section: dict[str, Any], model: type[BaseModel], name: str, path: Path) -> None:
    _check_names(section, model, name, path)
    try:
        model(**_without_auto(section))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        raise TrainError(f"{path}: {place} = {first['input']!r}: {first['msg']}") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise TrainError(f"{path}: {name}: {error}") from None


def _check_names(section: dict[str, Any], model: type[BaseModel], name: str, path: Path) -> None:
    fields: dict[str, FieldInfo] = {}
    for field_name, field in model.model_fields.items():
        fields |= {field_name: field} | ({field.alias: field} if field.alias else {})
    for key, value in section.items():
        if name == "zero_optimization" and key in _REMOVED_ZERO:
            raise TrainError(f"{path}: `{name}.{key}` was removed from DeepSpeed: take it out")
        _known(key, fields, name, path)
        extra = fields[key].json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise TrainError(f"{path}: `{name}.{key}` is deprecated in DeepSpeed: write `{extra.get('new_param')}`")
        inner = _inner_model(fields[key].annotation)
        if inner is not None and isinstance(value, dict):
            _check_names(value, inner, f"{name}.{key}", path)


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in inner.items() if value != "auto"}
