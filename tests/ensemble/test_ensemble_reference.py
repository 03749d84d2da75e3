"""The engine beside a plain loop of transformers' own models, mixed in fp64: the same text, token for token, alone and in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import save_pretrained
from megaxelm.recipe import ModelConfig

VOCABULARY, NEAR = 260, 1e-4
"""Where the reference's two likeliest tokens are this close (nats), rounding may decide."""
XGLM = ModelConfig(family="xglm", hidden_size=64, num_layers=3, num_heads=4, intermediate_size=256, max_positions=400)
LLAMA = ModelConfig(
    family="llama", hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, max_positions=400, tie_embeddings=False
)


def experts(model: ModelConfig, number: int) -> list[Decoder]:
    config: DecoderConfig = config_from_recipe(model, VOCABULARY, 1, 2, 3)
    found = []
    for seed in range(number):
        decoder = Decoder(config)
        decoder.initialise(seed)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():  # far from uniform, and without falling into a loop of few tokens
                if parameter.ndim == 2:
                    parameter.mul_(6 if name.startswith("embed") else 40)
        found.append(decoder.eval())
    return found


@torch.no_grad()
def reference(
    decoders: list[Decoder], prompts: list[list[int]], steps: int, folder: Path
) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Greedy tokens of the uniform mixture by one cached fp64 forward pass of each transformers model a token; by how much they win; and
    their log-probabilities."""
    from transformers import AutoModelForCausalLM

    models: list[Any] = []
    for number, decoder in enumerate(decoders):
        save_pretrained(decoder, folder / f"e{number}")
        model = AutoModelForCausalLM.from_pretrained(folder / f"e{number}", dtype=torch.float32, attn_implementation="eager").eval()
        models.append(model if decoder.config.family == "xglm" else model.double())  # transformers' XGLM cannot run in fp64
    tokens: list[list[int]] = []
    gaps: list[list[float]] = []
    logprobs: list[list[float]] = []
    for prompt in prompts:
        caches: list[Any] = [None] * len(models)
        given = torch.tensor([prompt])
        written, ahead, said = [], [], []
        for _ in range(steps):
            own = []
            for number, model in enumerate(models):
                out = model(given, past_key_values=caches[number], use_cache=True)
                caches[number] = out.past_key_values
                own.append(out.logits[0, -1].double().log_softmax(-1))
            top = (torch.stack(own).logsumexp(0) - math.log(len(own))).topk(2)
            written.append(int(top.indices[0]))
            ahead.append(float(top.values[0] - top.values[1]))
            said.append(float(top.values[0]))
            given = top.indices[:1][None]
        tokens.append(written)
        gaps.append(ahead)
        logprobs.append(said)
    return tokens, gaps, logprobs


def ours(ensemble: Ensemble, prompts: list[list[int]], steps: int, **options: Any) -> tuple[list[list[int]], list[list[float]]]:
    engine = Engine(ensemble, router="uniform", **options)
    numbers = [engine.add(GenerationRequest(ids[1:], None, SamplingParams(steps, stop_at_eos=False))) for ids in prompts]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    logprobs: dict[int, list[float]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
            logprobs[event.request_id].append(event.logprob)
    return [tokens[number] for number in numbers], [logprobs[number] for number in numbers]


def near_ties(found: list[list[int]], expected: list[list[int]], gaps: list[list[float]]) -> int:
    """Texts that part from the reference, each at a near tie; anything else fails."""
    parted = 0
    for text, (ours_, theirs) in enumerate(zip(found, expected, strict=True)):
        place = next((place for place, (a, b) in enumerate(zip(ours_, theirs, strict=True)) if a != b), None)
        if place is not None:
            assert gaps[text][place] <= NEAR, (
                f"text {text}, token {place}: {ours_[place]} is not {theirs[place]}, {gaps[text][place]:.2g} ahead"
            )
            parted += 1
    return parted


@pytest.mark.slow
@pytest.mark.parametrize(("model", "number"), [(LLAMA, 4), (XGLM, 8)], ids=["llama", "xglm"])
def test_256_greedy_tokens_are_those_of_transformers_models_mixed_in_fp64(
    model: ModelConfig, number: int, make_ensemble: Callable[..., Ensemble], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoders = experts(model, number)
    prompts = [[1, 40, 50, 60, 70], [1]]
    expected, gaps, logprobs = reference(decoders, prompts, 256, tmp_path)
    found, said = ours(make_ensemble(decoders), prompts, 256)
    parted = near_ties(found, expected, gaps)
    if not parted:
        difference = (torch.tensor(said, dtype=torch.float64) - torch.tensor(logprobs, dtype=torch.float64)).abs().max()
        assert difference <= 1e-4
    with capsys.disabled():
        print(f"\n{model.family}: {parted} of {len(prompts)} texts of 256 tokens part from the reference, at near ties")
    assert len(set(expected[0])) > 20, "a text of few tokens would prove little"


@pytest.mark.slow
def test_bf16_stays_near_the_reference(make_ensemble: Callable[..., Ensemble], tmp_path: Path) -> None:
    """Log-probabilities in bf16 are within 3 times the difference that one bf16 rounding of the weights makes in fp64."""
    decoders = experts(LLAMA, 4)
    prompts = [[1, 40, 50, 60, 70]]
    _, _, exact = reference(decoders, prompts, 1, tmp_path / "exact")
    rounded = []
    for decoder in decoders:
        other = Decoder(decoder.config)
        other.load_state_dict({name: tensor.bfloat16().float() for name, tensor in decoder.state_dict().items()})
        rounded.append(other.eval())
    _, _, once = reference(rounded, prompts, 1, tmp_path / "rounded")
    ensemble = replace(make_ensemble(decoders), dtype=torch.bfloat16)
    _, found = ours(ensemble, prompts, 1)
    assert abs(found[0][0] - exact[0][0]) <= 3 * abs(once[0][0] - exact[0][0]) + 0.05


@pytest.mark.slow
def test_a_text_alone_is_the_text_in_a_batch_of_16(make_ensemble: Callable[..., Ensemble], tmp_path: Path) -> None:
    decoders = experts(LLAMA, 4)
    ensemble = make_ensemble(decoders)
    prompts = [[1, *((7 * text + place) % 250 + 4 for place in range(3 * text))] for text in range(16)]
    together, _ = ours(ensemble, prompts, 100)
    expected, gaps, _ = reference(decoders, prompts[5:6], 100, tmp_path)
    alone, _ = ours(ensemble, prompts[5:6], 100)
    near_ties(together[5:6], expected, gaps)
    near_ties(alone, expected, gaps)
    for text in (0, 9, 15):
        assert ours(ensemble, prompts[text : text + 1], 100)[0][0] == together[text]
