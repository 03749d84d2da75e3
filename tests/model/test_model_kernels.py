"""A whole decoder by Triton's kernels and by torch: the same losses and gradients, in every family's shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.recipe import ModelConfig

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL: dict[str, Any] = {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "max_positions": 64}
SHAPES = {
    "xglm": ModelConfig(family="xglm", tie_embeddings=True, **SMALL),
    "llama": ModelConfig(family="llama", num_kv_heads=2, tie_embeddings=False, **SMALL),
    "qwen2": ModelConfig(family="qwen2", num_kv_heads=2, tie_embeddings=True, **SMALL),
    "qwen3": ModelConfig(family="qwen3", num_kv_heads=2, tie_embeddings=True, **SMALL),
}


def shape(family: str) -> DecoderConfig:
    return config_from_recipe(SHAPES[family], 203, 0, 1, 2)


def decoder(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config)
    model.initialise(3)
    for name, parameter in model.named_parameters():  # a zero bias or a norm of ones would hide a mistake in them
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE, dtype)


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    lengths = [3, 9, 1, 7]
    tokens = torch.randint(3, 203, (sum(lengths),), generator=generator)
    labels = torch.cat([tokens[1:], tokens[:1]])
    labels[4::9] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    made = {"tokens": tokens, "positions": positions, "cu_seqlens": cu_seqlens, "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def gradients(model: Decoder, kernels: str) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch(0), kernels=kernels).loss_sum
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize("family", SHAPES)
def test_loss_and_gradients_are_as_near_to_fp64_as_those_of_torch(family: str, checkpointed: int) -> None:
    model = decoder(shape(family))
    model.enable_activation_checkpointing(checkpointed)
    true_loss, truth = gradients(decoder(shape(family), torch.float64), "torch")
    loss, ours = gradients(model, "triton")
    their_loss, theirs = gradients(model, "torch")
    assert abs(loss - true_loss) <= 2 * abs(their_loss - true_loss) + 1e-6 * true_loss
    for name, exactly in truth.items():
        error, judge = (float((found[name].double() - exactly).norm() / exactly.norm()) for found in (ours, theirs))
        assert error <= 3 * judge + 1e-7, f"{name}: {error:.1e}, torch {judge:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xglm", "qwen3"])
def test_training_by_either_gives_one_loss_curve(family: str) -> None:
    curves = []
    for kernels in ("triton", "torch"):
        model = decoder(shape(family))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for step in range(5):
            loss = model(**batch(step % 2), kernels=kernels).loss_sum / 17
            curve.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.2
    assert curves[0] == pytest.approx(curves[1], rel=2e-5)


def test_scores_and_cached_decoding_agree_with_torch() -> None:
    model = decoder(shape("qwen3")).eval()
    inputs = batch(1)
    labels = inputs.pop("labels")
    by_triton, by_torch = (model.score(**inputs, labels=labels, kernels=kernels).target_logprob for kernels in ("triton", "torch"))
    torch.testing.assert_close(by_triton, by_torch, rtol=1e-5, atol=1e-5)


def test_kernels_that_are_not_there_are_an_error() -> None:
    with pytest.raises(ModelError, match="kernels = 'cuda': choose auto, triton, torch"):
        decoder(shape("llama"))(**batch(0), kernels="cuda")
