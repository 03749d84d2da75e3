"""Model FLOPs against counted ones, peaks by name, and what a meter measures."""

import gzip
import json
import mmap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaxelm.errors import TrainError
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.recipe import ModelConfig
from megaxelm.train.memory import memory, reset_peak
from megaxelm.train.metrics import Meter, Metrics, console_line, read_metrics
from megaxelm.train.profile import Profile, parse_steps
from megaxelm.train.throughput import attended, peak_tflops, token_flops

CPU = torch.device("cpu")
SHAPES = {
    "llama": ModelConfig(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48, tie_embeddings=False),
    "xglm": ModelConfig(family="xglm", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, tie_embeddings=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_flops_of_a_token_are_those_that_torch_counts(name: str) -> None:
    """torch counts the whole square of the attention, so here a token sees all of them."""
    config = config_from_recipe(SHAPES[name], 256, 0, 1, 2)
    model = Decoder(config)
    model.initialise(0)
    tokens, length = torch.randint(4, 256, (64,)), 64
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(tokens, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
        model.logits(hidden).sum().backward()
    assert token_flops(config, length) == counter.get_total_flops() / length


@pytest.mark.parametrize(("lengths", "window", "pairs"), [([4], None, 10), ([3, 1], None, 7), ([5], 2, 9), ([2], 8, 3), ([], None, 0)])
def test_the_pairs_of_causal_attention(lengths: list[int], window: int | None, pairs: int) -> None:
    assert attended(lengths, window) == pairs
    seen = sum(min(place + 1, window or length) for length in lengths for place in range(length))
    assert pairs == seen


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("AMD Instinct MI300X", 1307.0),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("CPU", None),
    ],
)
def test_peaks_by_the_name_of_the_device(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
    assert peak_tflops(name, 50.0) == 50.0


def tiny_meter(peak: float | None = None) -> Meter:
    return Meter(config_from_recipe(SHAPES["llama"], 256, 0, 1, 2), 16, 1, CPU, peak)


def test_a_line_says_speed_work_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    meter = tiny_meter(peak=1e-3)
    with meter.data():
        clock.seconds += 3
    meter.count(SimpleNamespace(cu_seqlens=torch.tensor([0, 4, 16]), tokens=torch.zeros(16)))  # type: ignore[arg-type]
    clock.seconds += 1
    line = meter.line({"step": 1, "loss": 2.0}, tokens=1000)
    assert line["tokens_per_second"] == pytest.approx(1000 / 4)
    assert line["attended_tokens"] == (10 + 78) / 16
    assert line["model_tflops"] == pytest.approx(250 * token_flops(meter.config, 5.5) / 1e12)
    assert line["mfu"] == pytest.approx(line["model_tflops"] / 1e-3)
    assert line["data_share"] == pytest.approx(3 / 4)
    clock.seconds += 2
    later = meter.line({"step": 2, "loss": 1.0}, tokens=10)
    assert later["tokens_per_second"] == pytest.approx(5), "a new line begins anew"
    assert later["data_share"] == 0 and later["attended_tokens"] == 8.5, "with whole windows where none was counted"


def test_an_unknown_device_has_no_mfu_and_the_console_says_how_to_set_it() -> None:
    line = tiny_meter().line({"step": 3, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 48}, tokens=48)
    assert line["mfu"] is None
    text = console_line("dense", 10, line)
    assert "dense: step 3/10, loss 2.5000" in text and "MFU n/a (set train.peak_tflops)" in text and "peak memory" in text


def pages(size: int) -> mmap.mmap:
    """Resident memory of its own: what the C library gives depends on what earlier tests left in its heap."""
    held = mmap.mmap(-1, size)
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    return held


def test_the_peak_of_memory_is_what_was_held_at_once() -> None:
    pages(300_000_000).close()
    reset_peak(CPU)
    before = memory(CPU)
    held = pages(100_000_000)
    with_it = memory(CPU)
    held.close()
    after = memory(CPU)
    assert with_it["resident"] - before["resident"] == pytest.approx(1e8, rel=0.1)
    assert after["resident"] < with_it["resident"] - 5e7
    assert after["peak_resident"] - before["resident"] == pytest.approx(1e8, rel=0.1)


def test_the_monitor_of_deepspeed_gets_the_figures(tmp_path: Path) -> None:
    events: list[tuple[str, float, int]] = []
    monitor: Any = SimpleNamespace(enabled=True, write_events=events.extend)
    metrics = Metrics(tmp_path, 0, monitor)
    metrics.write({"step": 4, "loss": 2.0, "mfu": None, "memory": {"resident": 5}})
    metrics.close()
    assert events == [("train/loss", 2.0, 4), ("train/memory/resident", 5, 4)]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["mfu"] is None


def test_a_monitor_that_is_not_enabled_is_left_alone(tmp_path: Path) -> None:
    Metrics(tmp_path, 0, SimpleNamespace(enabled=False)).write({"step": 1, "loss": 1.0})


@pytest.mark.parametrize(("text", "steps"), [("10-12", range(10, 13)), ("3", range(3, 4)), ("1-1", range(1, 2))])
def test_steps_to_profile(text: str, steps: range) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "a", "0", "5-4", "1-", "-3", "1-2-3"])
def test_steps_to_profile_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(TrainError, match="--profile .*for example 10-12"):
        parse_steps(text)


@pytest.mark.parametrize(("last", "name"), [(6, "rank0-steps2-3"), (2, "rank0-steps2-2")])
def test_a_trace_holds_the_chosen_steps_and_no_others(tmp_path: Path, last: int, name: str) -> None:
    with Profile(tmp_path / "profile", parse_steps("2-3"), 0) as profile:
        for number in range(1, last + 1):
            with profile.step(number):
                torch.ones(8) @ torch.ones(8)
        assert (tmp_path / "profile").exists() == (last > 3), "a trace is written when its last step is done"
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == f"{name}.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    seen = {event["name"] for event in events if str(event.get("name", "")).startswith("step ")}
    assert seen == {f"step {number}" for number in range(2, min(3, last) + 1)}


def test_without_steps_nothing_is_traced(tmp_path: Path) -> None:
    with Profile(tmp_path / "profile", None, 0) as profile, profile.step(1):
        pass
    assert not (tmp_path / "profile").exists()
