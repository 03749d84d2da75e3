"""A training that is killed at any moment and started again is, bit for bit, the training that was never stopped."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lives import Death, Life, Lives, faults

from megaxelm.run import MARKER
from megaxelm.train.checkpoint import Layout
from megaxelm.train.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS, BATCH = 8, 8
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every=3", "model.dropout=0.1", "model.attention_dropout=0.1")
FOLDER = "megaxelm.train.checkpoint_folder"
SECOND_SAVE = ("megaxelm.train.checkpoint:Checkpoints.save", 2)
BACKWARD = "deepspeed.runtime.engine:DeepSpeedEngine.backward"

# ZeRO stage, precision, where it dies, the step that the next life begins with (two micro-batches a rank and step, checkpoints at 3, 6, 8).
MOMENTS = {
    "before the first checkpoint": (0, "fp32", Death([(BACKWARD, 3)]), 0),
    "in the middle of accumulation": (1, "bf16", Death([(BACKWARD, 9)], "after", rank=1), 3),
    "inside the optimizer": (2, "fp32", Death([(BACKWARD, 10), ("torch.optim:AdamW.step", 1)], rank=1), 3),
    "within a file of a save": (3, "bf16", Death([SECOND_SAVE, (f"{FOLDER}:_Hashed.write", 1)], "after", rank=1), 3),
    "between files and marker": (0, "bf16", Death([SECOND_SAVE, (f"{FOLDER}:write_json", 1)]), 3),
    "between marker and rename": (1, "fp32", Death([SECOND_SAVE, (f"{FOLDER}:os.rename", 1)]), 3),
    "between rename and `latest`": (2, "bf16", Death([SECOND_SAVE, (f"{FOLDER}:point_latest", 1)]), 6),
    "before `latest` of the last save": (0, "bf16", Death([(f"{FOLDER}:point_latest", 3)]), 8),
    "while the old one is removed": (3, "fp32", Death([(f"{FOLDER}:_remove_old", 2), (f"{FOLDER}:remove", 1)]), 6),
    "right after a save": (1, "fp32", Death([SECOND_SAVE], "after", rank=1), 6),
    "before the export": (3, "bf16", Death([("megaxelm.train.loop:export_trained", 1)]), 8),
}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with Lives(tmp_path_factory.mktemp("lives")) as lives:
        yield lives


def train(lives: Lives, run: Path, stage: int, precision: str, *settings: str, ranks: int = 2, death: Death | None = None) -> Life:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {}}}
    path = run.parent / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    sets = [part for setting in (*SETTINGS, f"train.precision={precision}", *settings) for part in ("--set", setting)]
    life = lives.live(str(run), "--expert", "seed", "--deepspeed_config", str(path), *sets, ranks=ranks, death=death)
    assert death or (run / "experts" / "seed" / MARKER).exists(), life.output
    return life


def outcome(run: Path) -> tuple[list[float], str]:
    """The loss of every step, and the hash of the weights."""
    folder = run / "experts" / "seed"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines], json.loads((folder / MARKER).read_text())["weights"]


@pytest.fixture(scope="module")
def whole(lives: Lives, _indexed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Life, Path]]:
    """The run of a ZeRO stage and precision that was never stopped, trained once."""
    done: dict[tuple[int, str], tuple[Life, Path]] = {}

    def of(stage: int, precision: str) -> tuple[Life, Path]:
        if (stage, precision) not in done:
            run = tmp_path_factory.mktemp("whole") / "tiny"
            shutil.copytree(_indexed_run / "runs" / "tiny", run)
            done[stage, precision] = train(lives, run, stage, precision), run
        return done[stage, precision]

    return of


ASYNCHRONOUS = ("within a file of a save", "between files and marker", "between rename and `latest`")


@pytest.mark.parametrize("moment, asynchronous", [(moment, False) for moment in MOMENTS] + [(moment, True) for moment in ASYNCHRONOUS])
def test_a_killed_run_goes_on_bit_for_bit(
    lives: Lives, whole: Callable[..., tuple[Life, Path]], indexed_run: Path, moment: str, asynchronous: bool
) -> None:
    stage, precision, death, resumed = MOMENTS[moment]
    whole_life, whole_run = whole(stage, precision)
    saving = f"train.async_checkpoints={asynchronous}".lower()
    first = train(lives, indexed_run, stage, precision, saving, death=death)
    assert first.codes == [-9, -9], first.output
    second = train(lives, indexed_run, stage, precision, saving)
    if not asynchronous:
        choices = json.loads((indexed_run / "experts" / "seed" / "choices.json").read_text())
        assert choices["resumed_from_step"] == resumed
    assert faults([first, second], whole_life, STEPS * BATCH) == []
    assert outcome(indexed_run) == outcome(whole_run)


def test_all_ranks_end_together_when_one_cannot_write_and_when_the_newest_checkpoint_is_damaged(lives: Lives, indexed_run: Path) -> None:
    checkpoints = indexed_run / "experts" / "seed" / "checkpoints"
    full = train(lives, indexed_run, 2, "fp32", death=Death([SECOND_SAVE, (f"{FOLDER}:os.fsync", 1)], "disk full", rank=1))
    assert full.codes == [2, 2], full.output
    assert "the checkpoint of step 6 could not be written (rank 1: " in full.output and "No space left on device" in full.output
    assert (checkpoints / "latest").read_text() == "3" and not (checkpoints / "6").exists()

    damaged = next((checkpoints / "3").glob("*rank_1*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    refused = train(lives, indexed_run, 2, "fp32", death=Death([(BACKWARD, 1)]))
    assert refused.codes == [2, 2], refused.output
    assert f"{damaged}: damaged since it was written; remove the folder" in refused.output and "Traceback" not in refused.output


# Ranks and ZeRO stage before and after, and the precision.
CARRIED = [
    ((2, 3), (1, 1), "fp32"),
    ((2, 1), (1, 3), "fp32"),
    ((2, 2), (1, 0), "fp32"),
    ((2, 0), (1, 2), "fp32"),
    ((1, 3), (2, 2), "fp32"),
    ((2, 1), (2, 3), "fp32"),
    ((2, 3), (1, 0), "bf16"),
    ((2, 0), (2, 1), "bf16"),
]


@pytest.mark.parametrize("before, after, precision", CARRIED)
def test_other_ranks_and_zero_stages_go_on_with_the_same_samples_and_loss(
    lives: Lives,
    whole: Callable[..., tuple[Life, Path]],
    indexed_run: Path,
    before: tuple[int, int],
    after: tuple[int, int],
    precision: str,
) -> None:
    whole_life, whole_run = whole(before[1], precision)
    death = Death([SECOND_SAVE], "after")
    first = train(lives, indexed_run, before[1], precision, "train.checkpoint_every=2", ranks=before[0], death=death)
    second = train(lives, indexed_run, after[1], precision, "train.checkpoint_every=2", ranks=after[0])
    assert f"resumed from step 4, saved by {Layout(*before, precision)}; now {Layout(*after, precision)}" in second.output
    assert faults([first, second], whole_life, STEPS * BATCH) == []
    assert outcome(indexed_run)[0] == pytest.approx(outcome(whole_run)[0], rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(
    "first, second, fault",
    [
        ("abc", (2, "cdef"), ""),
        ("abc", (4, "ef"), "lost"),
        ("abc", (2, "cde"), "lost"),
        ("abc", (2, "cxef"), "something else as sample 3"),
        ("abb", (2, "cdef"), "something else as sample 2"),
    ],
)
def test_lost_and_changed_samples_are_seen(first: str, second: tuple[int, str], fault: str) -> None:
    def life(start: int, tokens: str) -> Life:
        return Life([0], list(enumerate(tokens, start)), "")

    found = faults([life(0, first), life(*second)], life(0, "abcdef"), 6)
    assert (fault in "; ".join(found)) if fault else not found
    assert "life 0 read a sample twice" in faults([Life([0], [*enumerate("abcdef"), (3, "d")], "")], life(0, "abcdef"), 6)
