"""The engine on a CUDA device: graphs, kernels and torch write the same texts, and a step waits for the device where it must alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.model.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["The cat", "", "a longer prompt than the others", "x"]


def written(ensemble: Ensemble, temperature: float, **options: Any) -> list[list[int]]:
    engine = Engine(ensemble, **options)
    texts = [SamplingParams(8 + 5 * number, temperature, stop_at_eos=False) for number in range(len(PROMPTS))]
    numbers = [engine.add(GenerationRequest(prompt, None, sampling)) for prompt, sampling in zip(PROMPTS, texts, strict=True)]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event.token_id)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("router", "top_m"), [("uniform", None), ("tfidf", 2), ("posterior", None)])
def test_graphs_kernels_and_torch_write_the_same(
    router: str, top_m: int | None, temperature: float, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    ensemble = replace(make_ensemble(decoders), device="cuda")
    options: dict[str, Any] = {"router": router, "top_m": top_m}
    expected = written(ensemble, temperature, kernels="torch", **options)
    assert written(ensemble, temperature, kernels="triton", graphs=False, **options) == expected
    first = written(ensemble, temperature, kernels="triton", graphs=True, **options)
    assert first == expected == written(ensemble, temperature, kernels="triton", graphs=True, **options)
    assert written(ensemble, temperature, kernels="triton", draft="e1", **options) == expected


def test_a_stack_in_bf16_stays_near_fp32(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    logprobs = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(replace(make_ensemble(decoders), device="cuda", dtype=dtype), router="uniform", graphs=True)
        engine.add(GenerationRequest("The cat", None, SamplingParams(1)))
        logprobs.append(engine.step()[0].logprob)
    assert abs(logprobs[0] - logprobs[1]) < 0.1
