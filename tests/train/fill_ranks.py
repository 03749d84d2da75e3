"""On every rank: fill engines of all ZeRO stages, look at what they hold, take a step, save, and read the checkpoint back.

Started by `test_train_fill.py`; ends with an error where something differs.
"""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder
from megaxelm.train.engine import _parameter_groups
from megaxelm.train.fill import fill_engine
from megaxelm.train.process_group import join_process_group
from megaxelm.train.zero_state import MOMENTS, CheckpointState

CONFIG = DecoderConfig("llama", 300, 9, 2, 2, 2, 6, 23, 64, tie_embeddings=True)  # odd sizes: partitions need padding
STEP = 7
ADAM = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "zero0 fp32": {"zero_optimization": {"stage": 0}},
    "zero0 bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "zero1 fp32": {"zero_optimization": {"stage": 1}},
    "zero1 bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero1 bf16 with fp32 gradients": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero2 bf16": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": True}},
    "zero2 fp32 aligned": {"zero_optimization": {"stage": 2, "parameter_alignment": True}},
    "zero3 fp32": {"zero_optimization": {"stage": 3}},
    "zero3 bf16": {"zero_optimization": {"stage": 3, "sub_group_size": 1000}, "bf16": {"enabled": True}},
    "zero3 bf16 offloaded": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
    },
}


def full_state() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights, and moments that outweigh one gradient, so that the next step shows whether they arrived."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: tuple(parameter.shape) for name, parameter in Decoder(CONFIG).named_parameters()}
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    moments = {
        name: {"exp_avg": torch.randn(shape, generator=generator), "exp_avg_sq": 0.5 + torch.rand(shape, generator=generator)}
        for name, shape in shapes.items()
    }
    return weights, moments


def loss_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(20)
    return model(tokens, tokens, torch.tensor([0, 20]), labels=tokens + 1).loss_sum / 20


def plain_step(weights: dict[str, Any], moments: dict[str, Any] | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights after one more step of torch's AdamW; the gradient is of the model in `dtype`."""
    model = Decoder(CONFIG)
    model.load_state_dict(weights, strict=False)
    groups = _parameter_groups(model, ADAM["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=ADAM["lr"], betas=ADAM["betas"], eps=ADAM["eps"])
    low = copy.deepcopy(model).to(dtype)
    loss_of(low).backward()
    for name, parameter in model.named_parameters():
        parameter.grad = low.get_parameter(name).grad.float()
        if moments is not None:
            copied = {key: moment.clone() for key, moment in moments[name].items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(STEP))} | copied
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_kind(kind: str, settings: dict[str, Any], folder: Path) -> None:
    weights, moments = full_state()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": ADAM | {"torch_adam": True}},
        "steps_per_print": 10**9,
    } | copy.deepcopy(settings)
    stage = config["zero_optimization"]["stage"]
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else nullcontext():
        model = Decoder(CONFIG)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=_parameter_groups(model, ADAM["weight_decay"]), config=config)
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    loose = 2e-3 if dtype == torch.bfloat16 else 1e-6

    for given in (moments, None):
        fill_engine(engine, weights.__getitem__, None if given is None else given.__getitem__, STEP if given else 0)
        if stage and "round_robin" not in str(settings):  # DeepSpeed's own look at its state takes the other order for granted
            for name, parameter in engine.module.named_parameters():
                torch.testing.assert_close(safe_get_full_fp32_param(parameter).cpu(), weights[name], rtol=0, atol=0)
                for key in MOMENTS if given is not None else ():
                    torch.testing.assert_close(safe_get_full_optimizer_state(parameter, key).cpu(), moments[name][key], rtol=0, atol=0)
        expected = plain_step(weights, given, dtype)
        loss = loss_of(engine)
        reference = Decoder(CONFIG).to(dtype)
        reference.load_state_dict(weights, strict=False)
        torch.testing.assert_close(loss.detach().float(), loss_of(reference).detach().float(), rtol=1e-6, atol=1e-6)
        engine.backward(loss)
        engine.step()
        tag = "filled" if given else "fresh"
        engine.save_checkpoint(str(folder / kind.replace(" ", "_")), tag=tag, save_latest=False)
        torch.distributed.barrier()
        state = CheckpointState.open(folder / kind.replace(" ", "_") / tag)
        assert state.names == tuple(weights), state.names
        assert state.optimizer_step == (STEP + 1 if given else 1), (kind, state.optimizer_step)
        for name, tensor in expected.items():
            assert state.shape(name) == tuple(tensor.shape)
            # Where the gradient is near zero its first step has either sign: 2 lr.
            torch.testing.assert_close(state.weight(name), tensor, rtol=0, atol=loose if given else 2.2e-2)
            if given:
                first, second = (state.moments(name)[key] - moments[name][key] for key in MOMENTS)
                assert first.abs().max() < 1 and second.abs().max() < 0.2, name
            else:
                assert (state.weight(name) - weights[name]).abs().max() < 1.5e-2, name


def main() -> None:
    join_process_group(cuda=False)
    for kind, settings in KINDS.items():
        check_kind(kind, settings, Path(sys.argv[1]))
        print(f"filled: {kind}", flush=True)
    print("filled all kinds", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
