"""Kill a training of two ranks at random moments, resume it, and compare with one that was never stopped.

    python benchmarks/kill.py [--stages 0 1 2 3] [--kills 20] [--precision bf16] [--asynchronous] [--seed 0] [--output FILE]

For each ZeRO stage a run is killed again and again (SIGKILL of all its ranks, at a moment drawn from the time that start-up and a few dozen
steps take) and resumed until it is done; a new run begins until there were enough kills. Dropout is on, and a checkpoint is written every
third step, so that many kills meet one. Counted: kills in start-up (before the first sample), in training, and while a checkpoint was
unfinished; samples that no surviving step read, or that more than one did, or that were other tokens than those of the whole run; steps
whose loss differs in a bit; runs whose exported weights differ. All of the last three must be 0, or the exit code is 1. Prints a table,
then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from lives import Death, Life, Lives, faults
from tiny_run import tiny_recipe, write_corpus

from megaxelm.recipe import parse_recipe
from megaxelm.run import MARKER, RunFolder
from megaxelm.stages import Stages
from megaxelm.train.metrics import read_metrics

STEPS, BATCH, CHECKPOINT_EVERY = 240, 8, 3
WINDOW = 3.0  # seconds of training in which a kill falls, beside those of the start-up


@dataclass
class Result:
    """What the kills of one ZeRO stage did."""

    stage: int
    kills: int = 0
    in_start_up: int = 0
    in_a_save: int = 0
    runs: int = 0
    wrong_samples: int = 0
    wrong_losses: int = 0
    wrong_weights: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not (self.wrong_samples or self.wrong_losses or self.wrong_weights)


class Bench:
    """Runs of one ZeRO stage under `base`, which holds a run made up to its token index."""

    def __init__(self, lives: Lives, base: Path, stage: int, options: argparse.Namespace) -> None:
        self.lives, self.base, self.stage = lives, base, stage
        self.config = base / f"zero{stage}.json"
        parts = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {}}}
        self.config.write_text(json.dumps(parts))
        settings = [
            f"train.steps={STEPS}",
            f"train.checkpoint_every={CHECKPOINT_EVERY}",
            "model.dropout=0.1",
            "model.attention_dropout=0.1",
        ]
        settings += [f"train.precision={options.precision}", f"train.async_checkpoints={str(options.asynchronous).lower()}"]
        self.sets = [part for setting in settings for part in ("--set", setting)]

    def new_run(self, name: str) -> Path:
        run = self.base / f"zero{self.stage}" / name / "tiny"
        shutil.copytree(self.base / "runs" / "tiny", run)
        return run

    def _arguments(self, run: Path) -> list[str]:
        return [str(run), "--expert", "seed", "--deepspeed_config", str(self.config), *self.sets]

    def live(self, run: Path, seconds: float = 600.0) -> Life:
        return self.lives.live(*self._arguments(run), seconds=seconds)

    def start_up_seconds(self) -> float:
        """Time from the start of the ranks to the first sample that is read."""
        began = time.monotonic()
        self.lives.live(*self._arguments(self.new_run("start-up")), death=Death([("megaxelm.corpus.sampling:Blend.read", 1)]))
        return time.monotonic() - began

    def finish(self, run: Path) -> Life:
        life = self.live(run)
        if life.codes != [0, 0]:
            raise SystemExit(f"{run}: training ended with {life.codes}\n{life.output}")
        return life


def measure(bench: Bench, kills: int, draw: random.Random) -> Result:
    """Kill runs of one stage `kills` times, and compare each that was finished with one that was never stopped."""
    began = time.monotonic()
    result = Result(bench.stage)
    whole_run = bench.new_run("whole")
    whole = bench.finish(whole_run)
    start_up = bench.start_up_seconds()
    while result.kills < kills:
        run, lived = bench.new_run(f"killed-{result.runs}"), []
        result.runs += 1
        while result.kills < kills:
            life = bench.live(run, draw.uniform(0.0, start_up + WINDOW))
            lived.append(life)
            if life.codes == [0, 0]:
                break
            count(result, life, run)
        if not (run / "experts" / "seed" / MARKER).exists():
            lived.append(bench.finish(run))
        compare(result, lived, run, whole, whole_run)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def metrics_of(run: Path) -> Path:
    return run / "experts" / "seed" / "metrics.jsonl"


def count(result: Result, life: Life, run: Path) -> None:
    result.kills += 1
    result.in_start_up += not life.reads
    result.in_a_save += bool(life.reads) and any((run / "experts" / "seed" / "checkpoints").glob(".*.making"))
    if any(code not in (0, -9) for code in life.codes):
        result.faults.append(f"a life ended with {life.codes} before it was killed: {life.output[-2000:]}")
        result.wrong_losses += 1


def compare(result: Result, lived: list[Life], run: Path, whole: Life, whole_run: Path) -> None:
    found = faults(lived, whole, STEPS * BATCH)
    result.faults += found
    result.wrong_samples += len(found)
    mine, wanted = ({line["step"]: line["loss"] for line in read_metrics(metrics_of(path))} for path in (run, whole_run))
    result.wrong_losses += sum(mine.get(step) != wanted.get(step) for step in range(1, STEPS + 1))
    weights = [json.loads((path / "experts" / "seed" / MARKER).read_text())["weights"] for path in (run, whole_run)]
    result.wrong_weights += weights[0] != weights[1]


def _row(*cells: object) -> str:
    return " ".join(f"{cell:>9}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--kills", type=int, default=20, help="of each stage (default: 20)")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--asynchronous", action="store_true", help="train.async_checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        base = Path(name)
        recipe = parse_recipe(tiny_recipe(write_corpus(base / "corpus")))
        Stages(RunFolder(base / "runs" / "tiny"), recipe, say=lambda text: None).run(until="index")
        print(_row("ZeRO", "kills", "start-up", "in a save", "runs", "samples", "losses", "weights", "seconds"))
        with Lives(base) as lives:
            for stage in options.stages:
                one = measure(Bench(lives, base, stage, options), options.kills, random.Random(options.seed * 4 + stage))
                results.append(one)
                wrong = (one.wrong_samples, one.wrong_losses, one.wrong_weights)
                print(_row(stage, one.kills, one.in_start_up, one.in_a_save, one.runs, *wrong, one.seconds), flush=True)
                for fault in one.faults:
                    print(f"     {fault}", flush=True)
    line: dict[str, Any] = {
        "benchmark": "kill",
        "ranks": 2,
        "steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "precision": options.precision,
        "asynchronous": options.asynchronous,
        "seed": options.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "stages": [vars(one) for one in results],
    }
    print(json.dumps(line))
    if options.output:
        with open(options.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(not all(one.is_sound for one in results))


if __name__ == "__main__":
    sys.exit(main())
