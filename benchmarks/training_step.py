"""One training step of our decoder: tokens a second and model FLOPs utilisation by attention backend.

    python benchmarks/training_step.py [--steps 8]

On CUDA the shape of XGLM-1.7B with 8 sequences of 2048 tokens in bf16 and torch's fused AdamW; on a CPU a small model, where only ratios
between backends count. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from megaxelm.model.config import config_from_recipe, num_parameters
from megaxelm.model.decoder import Decoder
from megaxelm.recipe import ModelConfig
from megaxelm.train.throughput import attended, peak_tflops, token_flops


def shape(cuda: bool) -> tuple[ModelConfig, int, int, int]:
    """Model, vocabulary, sequences and tokens a sequence."""
    if cuda:
        xglm = ModelConfig(
            family="xglm", hidden_size=2048, num_layers=24, num_heads=16, intermediate_size=8192, max_positions=2048, tie_embeddings=True
        )
        return xglm, 256008, 8, 2048
    return ModelConfig(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=688, max_positions=512), 8192, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model_config, vocab, sequences, length = shape(cuda)
    config = config_from_recipe(model_config, vocab, 0, 2, 1)
    with torch.device(device):
        model = Decoder(config).to(torch.bfloat16)
    model.initialise(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda or None)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocab, (sequences * length,), generator=generator).to(device)
    labels = torch.randint(4, vocab, (sequences * length,), generator=generator).to(device)
    positions = torch.arange(length, device=device).repeat(sequences)
    cu_seqlens = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32)
    flops = token_flops(config, attended([length]) / length) * tokens.numel()
    results: dict[str, dict[str, float]] = {}
    for backend in ("sdpa", "varlen") if cuda else ("sdpa",):
        milliseconds = []
        for number in range(options.steps + 2):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            loss = model(tokens, positions, cu_seqlens, labels=labels, attention=backend).loss_sum / tokens.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            if number >= 2:
                milliseconds.append((time.perf_counter() - began) * 1e3)
        low, median, high = np.percentile(milliseconds, [10, 50, 90]).tolist()
        results[backend] = {
            "ms": round(median, 2),
            "p10": round(low, 2),
            "p90": round(high, 2),
            "tokens_per_second": round(tokens.numel() / median * 1e3),
        }
        peak = peak_tflops(torch.cuda.get_device_name()) if cuda else None
        if peak:
            results[backend]["mfu"] = round(flops / (median / 1e3) / (peak * 1e12), 4)
            results[backend]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(f"{backend:<8} " + "  ".join(f"{key} {value:,}" for key, value in results[backend].items()))
    device_name = torch.cuda.get_device_name() if cuda else "cpu"
    print(
        json.dumps(
            {
                "benchmark": "training_step",
                "device": device_name,
                "torch": torch.__version__,
                "parameters": num_parameters(config),
                "backends": results,
            }
        )
    )


if __name__ == "__main__":
    main()
