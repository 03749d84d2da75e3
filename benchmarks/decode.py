"""Decoding from a mixture of experts: ours beside transformers' models, one cached forward each a token, their probabilities mixed.

    python benchmarks/decode.py [--shape 10m|66m|1.7b] [--experts 1,2,4,8] [--batch 1,8] [--context 128] [--tokens 24] [--turns 3]
    python benchmarks/decode.py --scoring --experts 4 --output score.jsonl

loop      each expert's transformers model runs one token behind its DynamicCache; log-softmax, log-sum-exp over the experts, arg max
graphs    the same with static caches, a CUDA graph for each expert, one after the other (CUDA only)
branches  one CUDA graph in which every expert's forward is a branch of its own stream (CUDA only)
ours      `megaxelm.ensemble.engine`: stacked experts, one product for all

All have the same random weights and prompts, write greedily, and are compared first: a token may differ only where the peer's two
likeliest are within 1e-4 (fp32) or 0.1 (bf16), which is counted. Then they take turns A B A B; the figure is the median of all timed steps,
reading the prompt is not timed. `floor`: the bytes that a step has to read (weights once, keys and values of the context) at this
device's measured rate of reading. `--scoring` scores long texts instead: ours beside transformers' models with logits in chunks of rows.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import Ensemble, EnsembleSettings
from megaxelm.ensemble.routers import RouterData, UniformRouter
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.ensemble.scoring import score_documents
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.model.decoder import TABLES, Decoder, parameter_shapes
from megaxelm.model.families import get_family, hf_name
from megaxelm.model.source import WeightSource
from megaxelm.recipe import ModelConfig
from megaxelm_kernels.decode_cost import DecodeShape, decode_step_cost
from megaxelm_kernels.mixture_cost import mixture_cost

SHAPES: dict[str, tuple[ModelConfig, int]] = {
    "10m": (ModelConfig(family="llama", hidden_size=256, num_layers=6, num_heads=4, intermediate_size=1024, max_positions=4096), 8192),
    "66m": (ModelConfig(family="llama", hidden_size=512, num_layers=8, num_heads=8, intermediate_size=2730, max_positions=4096), 32000),
    "1.7b": (ModelConfig(family="xglm", hidden_size=2048, num_layers=24, num_heads=16, intermediate_size=8192, max_positions=2048), 256008),
}


def shape_config(shape: str) -> DecoderConfig:
    """The configuration of an expert."""
    model, vocab = SHAPES[shape]
    return config_from_recipe(model, vocab, 0, 1, 2)


Step = Callable[[], list[int]]


@dataclass
class Row:
    """One side at one setting; times are milliseconds a token step."""

    side: str
    experts: int
    batch: int
    context: int
    ms: float
    p10: float
    p90: float
    tokens_per_second: float
    floor_ms: float
    percent_of_floor: float
    ratio: float
    """Time of `loop` over this side's."""
    differ: int
    """Tokens that differ from the loop's, all of them near ties."""
    floor_bytes: int
    """What a token step has to read."""
    launches: int
    """Of our kernels on CUDA, counted from the code."""


class NoText:
    """A tokenizer for texts that are token ids already."""

    start_id, bos_id, eos_id = 0, 0, None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise TypeError("the prompts of this benchmark are token ids")

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def random_source(config: DecoderConfig, seed: int, dtype: torch.dtype, device: torch.device) -> WeightSource:
    """An expert of random weights, drawn on the device tensor by tensor: 1.7B parameters need no disk and no minute."""
    shapes = parameter_shapes(config)

    def weight(name: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        shape = shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("norm.weight")), dtype=dtype, device=device)
        deviation = 0.04 if name.startswith("layers") else 0.02  # predictions that are not all alike
        tensor = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, deviation, generator=generator)
        if name in TABLES:
            tensor[config.vocab_size :] = 0
        return tensor

    return WeightSource(config, weight)


def foreign(source: WeightSource, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' own model with the same weights."""
    from transformers import AutoModelForCausalLM

    config, family = source.config, get_family(source.config.family)
    attention = "eager" if config.family == "xglm" else "sdpa"  # transformers has no other attention for XGLM
    model = AutoModelForCausalLM.from_config(family.config_to_hf(config), dtype=dtype, attn_implementation=attention).to(device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in parameter_shapes(config):
            target = parameters[hf_name(family, name)]
            target.copy_(source.weight(name)[: target.shape[0]])
    return model.eval()


def own(source: WeightSource, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Our decoder of one expert, for scoring."""
    decoder = Decoder(source.config).to(device, dtype)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.weight(name))
    return decoder.eval()


def mix(logits: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the uniform mixture of experts' logits, each [batch, vocab]."""
    return torch.stack([each.float().log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))


class Loop:
    """One cached forward of each model a token."""

    def __init__(self, models: Sequence[Any], prompts: Tensor) -> None:
        self.models, self.caches, self.gaps = models, [], []
        logits = []
        for model in models:
            out = model(prompts, use_cache=True, logits_to_keep=1)
            self.caches.append(out.past_key_values)
            logits.append(out.logits[:, -1])
        self.token = self._choose(logits)

    def _choose(self, logits: Sequence[Tensor]) -> Tensor:
        mixed = mix(logits)
        top = mixed.topk(2, -1)
        self.gaps.append((top.values[:, 0] - top.values[:, 1]).tolist())
        return top.indices[:, :1]

    def step(self) -> list[int]:
        """The token that was chosen last, after the next one has been."""
        logits = []
        for number, model in enumerate(self.models):
            out = model(self.token, past_key_values=self.caches[number], use_cache=True)
            logits.append(out.logits[:, -1])
        self.token = self._choose(logits)
        return self.token[:, 0].tolist()


class Graphs:
    """Static caches and CUDA graphs: one for each expert in series, or one with a branch an expert."""

    def __init__(self, models: Sequence[Any], prompts: Tensor, length: int, branches: bool) -> None:
        from transformers import StaticCache

        self.models, self.batch = models, prompts.shape[0]
        device = prompts.device
        self.caches = [StaticCache(model.config, max_cache_len=length) for model in models]
        logits = []
        for model, cache in zip(models, self.caches, strict=True):
            out = model(prompts, past_key_values=cache, use_cache=True, cache_position=torch.arange(prompts.shape[1], device=device))
            logits.append(out.logits[:, -1])
        self.token = mix(logits).argmax(-1, keepdim=True)
        self.position = torch.tensor([prompts.shape[1]], device=device)
        self.logits: list[Any] = [None] * len(models)
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(2):
                self._run_all()
        torch.cuda.current_stream().wait_stream(warm)
        self.graphs = []
        for part in [range(len(models))] if branches else [[number] for number in range(len(models))]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                if branches:
                    self._run_branches()
                else:
                    self._run(part[0])
            self.graphs.append(graph)

    def _run(self, number: int) -> None:
        out = self.models[number](self.token, past_key_values=self.caches[number], use_cache=True, cache_position=self.position)
        self.logits[number] = out.logits[:, -1]

    def _run_all(self) -> None:
        for number in range(len(self.models)):
            self._run(number)

    def _run_branches(self) -> None:
        main = torch.cuda.current_stream()
        streams = [torch.cuda.Stream() for _ in self.models]
        for number, stream in enumerate(streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                self._run(number)
        for stream in streams:
            main.wait_stream(stream)

    def step(self) -> list[int]:
        """The next token of each text."""
        for graph in self.graphs:
            graph.replay()
        self.token.copy_(mix(self.logits).argmax(-1, keepdim=True))
        self.position += 1
        return self.token[:, 0].tolist()


class Ours:
    """The engine."""

    def __init__(self, ensemble: Ensemble, prompts: Tensor, tokens: int) -> None:
        self.engine = Engine(ensemble, router=UniformRouter(len(ensemble.experts)), max_batch=len(prompts), prefill_tokens=1 << 30)
        sampling = SamplingParams(max_new_tokens=tokens, stop_at_eos=False)
        for prompt in prompts[:, 1:].tolist():
            self.engine.add(GenerationRequest(prompt, sampling=sampling))
        self.engine.step()

    def step(self) -> list[int]:
        """The next token of each text."""
        return [event.token_id for event in self.engine.step()]


def read_rate(device: torch.device) -> float:
    """Bytes a second that this device reads from memory: the best of several sums over 512 MB (2 GB on CUDA)."""
    if device.type == "cuda":
        source = torch.empty(1 << 29, device=device)
        target = torch.empty_like(source)
        best = min(timed(lambda: target.copy_(source), device) for _ in range(10))
        return 2 * source.nbytes / best
    source = torch.ones(1 << 27)
    best = min(timed(source.sum, device) for _ in range(5))
    return source.nbytes / best


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    now(device)
    begin = now(device)
    work()
    return now(device) - begin


def now(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step_cost(config: DecoderConfig, experts: int, batch: int, context: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a token step cannot do without (weights once, keys and values), and launches by our kernels, counted from the code."""
    head = mixture_cost(
        batch=batch,
        experts_a_sequence=experts,
        experts_in_use=experts,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        itemsize=itemsize,
    )
    shape = DecodeShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        experts=experts,
        rows=batch * experts,
        context=context,
        itemsize=itemsize,
        gated=config.activation == "silu_gated",
        biases=config.mlp_bias,
        centred=config.norm == "layernorm",
        rotary=config.positions == "rotary",
        head_launches=head.launches,
    )
    cost = decode_step_cost(shape)
    return cost.floor_bytes, cost.launches


def compare(sides: dict[str, Step], gaps: list[list[float]], steps: int, bound: float) -> dict[str, int]:
    """Let all sides write; a token that differs from the loop's although the loop was sure is an error. What follows is not compared."""
    written = {name: [step() for _ in range(steps)] for name, step in sides.items()}
    differ = dict.fromkeys(sides, 0)
    for name, rows in written.items():
        apart: set[int] = set()
        for number, (ours, theirs) in enumerate(zip(rows, written["loop"], strict=True)):
            for text in set(range(len(ours))) - apart:
                if ours[text] != theirs[text]:
                    gap = gaps[number + 1][text]
                    if gap > bound:
                        raise SystemExit(f"{name}: text {text}, token {number}: {ours[text]} is not {theirs[text]}, {gap:.2g} ahead")
                    differ[name] += 1
                    apart.add(text)
    return differ


def decode(options: argparse.Namespace, experts: int, batch: int, context: int, rate: float) -> list[Row]:
    """All sides at one setting."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = shape_config(options.shape)
    sources = [random_source(config, seed, dtype, device) for seed in range(experts)]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, config.vocab_size, (batch, context), generator=generator)
    prompts[:, 0] = NoText.start_id
    names = [f"e{seed}" for seed in range(experts)]
    ensemble = Ensemble(
        names,
        [],
        NoText(config.vocab_size),  # type: ignore[arg-type]
        RouterData(names),
        EnsembleSettings("uniform"),
        sources=[lambda source=source: source for source in sources],  # type: ignore[misc]
        dtype=dtype,
        device=device,
    )
    models = [foreign(source, dtype, device) for source in sources]
    total = options.tokens * (options.turns + 1) + 2
    on_device = prompts.to(device)
    loop = Loop(models, on_device)
    sides: dict[str, Step] = {"loop": loop.step, "ours": Ours(ensemble, prompts, total).step}
    if device.type == "cuda":
        sides["graphs"] = Graphs(models, on_device, context + total, False).step
        sides["branches"] = Graphs(models, on_device, context + total, True).step
    differ = compare(sides, loop.gaps, options.tokens, 1e-4 if dtype == torch.float32 else 0.1)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.turns):
        for name, step in sides.items():
            times[name] += [timed(step, device) for _ in range(options.tokens)]
    read, launches = step_cost(config, experts, batch, context + total // 2, dtype.itemsize)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=10)
        floor = read / rate
        rows.append(
            Row(
                name,
                experts,
                batch,
                context,
                *(round(1e3 * value, 3) for value in (medians[name], cuts[0], cuts[-1])),
                round(batch / medians[name], 1),
                round(1e3 * floor, 3),
                round(100 * floor / medians[name], 1),
                round(medians["loop"] / medians[name], 2),
                differ[name],
                read,
                launches,
            )
        )
    return rows


def score(options: argparse.Namespace, experts: int) -> dict[str, Any]:
    """Log-likelihood of long texts under the uniform mixture: ours, and transformers' models with logits in chunks of rows."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = shape_config(options.shape)
    sources = [random_source(config, seed, dtype, device) for seed in range(experts)]
    length, number = options.score_length, options.score_texts
    texts = torch.randint(3, config.vocab_size, (number, length), generator=torch.Generator().manual_seed(2))
    decoders = [own(source, dtype, device) for source in sources]
    models = [foreign(source, dtype, device) for source in sources]

    def ours() -> list[float]:
        found = score_documents([lambda d=d: d for d in decoders], texts.tolist(), 0, UniformRouter(experts))  # type: ignore[misc]
        return [float(stream.sum()) for stream in found]

    def chunked() -> list[float]:
        ids = torch.cat([torch.zeros(number, 1, dtype=torch.int64), texts[:, :-1]], 1).to(device)
        streams = []
        for model in models:
            hidden = model.model(ids).last_hidden_state
            parts = []
            for text in range(number):
                for begin in range(0, length, 512):
                    logits = model.lm_head(hidden[text, begin : begin + 512]).float().log_softmax(-1)
                    parts.append(logits.gather(1, texts[text, begin : begin + 512, None].to(device))[:, 0])
            streams.append(torch.cat(parts))
        mixed = torch.stack(streams).double().logsumexp(0) - math.log(experts)
        return [float(part.sum()) for part in mixed.split(length)]

    first, second = ours(), chunked()
    worst = max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))
    if worst > (1e-5 if dtype == torch.float32 else 1e-2):
        raise SystemExit(f"scores differ by {worst:.2g}")
    times: dict[str, list[float]] = {"ours": [], "chunked": []}
    for _ in range(options.turns):
        times["ours"].append(timed(ours, device))
        times["chunked"].append(timed(chunked, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = number * length
    return {
        "experts": experts,
        "tokens": tokens,
        "relative_difference": worst,
        "tokens_per_second": {name: round(tokens / value, 1) for name, value in medians.items()},
        "ratio": round(medians["chunked"] / medians["ours"], 2),
    }


def numbers(text: str) -> list[int]:
    """`1,2,4` as whole numbers."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=list(SHAPES), default="1.7b" if cuda else "10m")
    parser.add_argument("--experts", type=numbers, default=[4] if cuda else [1, 2, 4, 8])
    parser.add_argument("--batch", type=numbers, default=[1, 8, 64] if cuda else [1, 8])
    parser.add_argument("--context", type=numbers, default=[512] if cuda else [128])
    parser.add_argument("--tokens", type=int, default=24, help="steps compared, and steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--scoring", action="store_true")
    parser.add_argument("--score-length", type=int, default=1024)
    parser.add_argument("--score-texts", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    import transformers

    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        device = torch.device(options.device)
        rate = read_rate(device)
        for experts in options.experts:
            if options.scoring:
                rows.append(score(options, experts))
                print(rows[-1], flush=True)
                continue
            for batch in options.batch:
                for context in options.context:
                    for row in decode(options, experts, batch, context, rate):
                        rows.append(asdict(row))
                        print(
                            f"{row.side:9s} experts {row.experts} batch {row.batch:2d} context {row.context:4d}: {row.ms:8.2f} ms a step "
                            f"({row.p10:.2f}-{row.p90:.2f}), {row.tokens_per_second:8.1f} tokens/s, {row.percent_of_floor:5.1f} % of "
                            f"the floor of {row.floor_ms:.2f} ms, {row.ratio:.2f} x the loop, {row.differ} near ties"
                            + (f"; {row.floor_bytes / 1e6:.1f} MB, {row.launches} launches on CUDA" if row.side == "ours" else ""),
                            flush=True,
                        )
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    line = json.dumps(
        {
            "benchmark": "score" if options.scoring else "decode",
            "shape": options.shape,
            "dtype": options.dtype,
            "device": machine,
            "threads": torch.get_num_threads(),
            "read_gb_per_s": round(rate / 1e9, 1),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": rows,
        }
    )
    if options.output:
        with options.output.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
