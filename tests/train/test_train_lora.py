"""Experts that are trained as low-rank deltas: what their marker holds, and that ranks, ZeRO stages and kills change nothing."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import Death, Life, Lives, faults

from megaxelm.model.hub import load_pretrained, open_pretrained, weights_hash
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.run import MARKER
from megaxelm.train.checkpoint import Layout
from megaxelm.train.members import lora_settings, member_settings, plan_members
from megaxelm.train.metrics import read_metrics
from megaxelm.train.zero_state import CheckpointState


def recipe(**sections: dict[str, Any]) -> Recipe:
    return parse_recipe({"name": "tiny", "corpus": {"train": "x.jsonl"}, "clusters": {"k": 4}} | sections)


def settings(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    given = recipe(**sections)
    return member_settings(given, plan_members(given, list("abcd"))[name])


def test_the_marker_of_whole_experts_is_what_it_was_before_there_were_deltas() -> None:
    assert set(settings("a")) == {"member", "train", "model", "export"}
    rates = {"lr", "schedule", "warmup_steps", "final_lr_ratio", "decay_share", "language_alpha"}
    assert set(settings("a")["member"]) >= rates and not any("lora" in key for key in settings("a")["member"])
    assert settings("a") == settings("a", experts={"kind": "full"})
    for name in ("seed", "dense"):
        assert settings(name) == settings(name, experts={"kind": "lora", "lora": {"rank": 3, "lr": 1e-2}})


def test_deltas_make_an_expert_another_one_and_have_a_rate_of_their_own() -> None:
    lora = settings("a", experts={"kind": "lora"})
    assert lora["lora"]["rank"] == 16 and lora != settings("a")
    assert lora != settings("a", experts={"kind": "lora", "lora": {"rank": 8}})
    assert settings("a", experts={"kind": "lora", "lora": {"lr": 0.02}})["member"]["lr"] == 0.02
    given = recipe(experts={"kind": "lora"})
    members = plan_members(given, list("abcd"))
    assert [name for name in members if lora_settings(given, members[name]) is not None] == list("abcd")


STEPS, BATCH = 8, 4
EXPERT = "bg-en"
SETTINGS = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=3",
    "model.dropout=0.0",
    "experts.kind=lora",
    "experts.lora.rank=3",
    "experts.lora.dropout=0.1",
    "experts.lora.lr=0.005",
    "model.tie_embeddings=true",
)
SECOND_SAVE = ("megaxelm.train.checkpoint:Checkpoints.save", 2)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with Lives(tmp_path_factory.mktemp("lives")) as lives:
        yield lives


def train(
    lives: Lives,
    run: Path,
    stage: int,
    precision: str,
    *settings: str,
    expert: str = EXPERT,
    ranks: int = 2,
    death: Death | None = None,
) -> Life:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {}}}
    path = run.parent / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    sets = [part for setting in (*SETTINGS, f"train.precision={precision}", *settings) for part in ("--set", setting)]
    life = lives.live(str(run), "--expert", expert, "--deepspeed_config", str(path), *sets, ranks=ranks, death=death)
    assert death or (run / "experts" / expert / MARKER).exists(), life.output
    return life


def outcome(run: Path) -> tuple[list[float], str]:
    """The loss of every step, and the hash of the weights."""
    folder = run / "experts" / EXPERT
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines], json.loads((folder / MARKER).read_text())["weights"]


@pytest.fixture(scope="module")
def seeded(lives: Lives, _indexed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision a run whose seed is trained."""
    found = {}
    for precision in ("fp32", "bf16"):
        found[precision] = tmp_path_factory.mktemp(precision) / "tiny"
        shutil.copytree(_indexed_run / "runs" / "tiny", found[precision])
        train(lives, found[precision], 1, precision, expert="seed", ranks=1)
    return found


Whole = Callable[..., tuple[Life, Path]]


@pytest.fixture(scope="module")
def whole(lives: Lives, seeded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The expert of a ZeRO stage, precision and number of ranks whose training was never stopped, trained once."""
    done: dict[tuple[int, str, int], tuple[Life, Path]] = {}

    def of(stage: int, precision: str, ranks: int = 2) -> tuple[Life, Path]:
        key = (stage, precision, ranks)
        if key not in done:
            run = tmp_path_factory.mktemp("whole") / "tiny"
            shutil.copytree(seeded[precision], run)
            done[key] = train(lives, run, stage, precision, ranks=ranks), run
        return done[key]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_on_two_ranks_is_one_rank(stage: int, whole: Whole) -> None:
    (_, alone), (_, run) = whole(1, "fp32", 1), whole(stage, "fp32")
    assert outcome(run)[0] == pytest.approx(outcome(alone)[0], rel=1e-5)
    assert outcome(run)[0][-1] < outcome(run)[0][0] - 0.05, "the curve must move for the comparison to mean something"
    ours, theirs = (load_pretrained(folder / "experts" / EXPERT / "export") for folder in (run, alone))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_activations_and_asynchronous_checkpoints_change_nothing(
    stage: int, lives: Lives, whole: Whole, seeded: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(seeded["fp32"], run)
    train(lives, run, stage, "fp32", "train.activation_checkpointing=full", "train.async_checkpoints=true")
    assert outcome(run)[0] == pytest.approx(outcome(whole(stage, "fp32")[1])[0], rel=1e-6)


@pytest.mark.slow
def test_dropout_of_the_deltas_alone_is_drawn(lives: Lives, seeded: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for number, dropout in enumerate((0.0, 0.5)):
        run = tmp_path / str(number) / "tiny"
        shutil.copytree(seeded["fp32"], run)
        train(lives, run, 0, "fp32", f"experts.lora.dropout={dropout}", ranks=1)
        losses.append(outcome(run)[0])
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]  # B is zero in the first step


@pytest.mark.slow
@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")])
def test_checkpoints_hold_deltas_alone_and_the_base_is_the_seed_bit_for_bit(stage: int, precision: str, whole: Whole) -> None:
    _, run = whole(stage, precision)
    folder = run / "experts" / EXPERT
    state = CheckpointState.open(folder / "checkpoints" / str(STEPS))
    assert len(state.names) == 2 * 7 * 2 and all(".lora_" in name for name in state.names)
    # DeepSpeed keeps a table of names and shapes besides; the embedding alone has 400 x 32 numbers.
    files = sum(path.stat().st_size for path in (folder / "checkpoints" / str(STEPS)).glob("*model_states.pt"))
    assert files < 2 * 400 * 32 * 4
    export, seed = open_pretrained(folder / "export"), open_pretrained(run / "experts" / "seed" / "export")
    assert export.adapter is not None and export.adapter.folder == run / "experts" / "seed" / "export"
    for name in state.names:
        assert torch.equal(export.part(name), state.weight(name)), name
    assert torch.equal(export.weight("embed.weight"), seed.weight("embed.weight"))
    choices = json.loads((folder / "choices.json").read_text())
    trained = sum(state.weight(name).numel() for name in state.names)
    assert choices["trained_parameters"] == trained < choices["parameters"]
    assert json.loads((folder / MARKER).read_text())["weights"] == weights_hash(folder / "export")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, precision, death, resumed",
    [
        (0, "fp32", Death([("deepspeed.runtime.engine:DeepSpeedEngine.backward", 2)]), 0),
        (0, "bf16", Death([SECOND_SAVE], "after", rank=1), 6),
        (1, "bf16", Death([SECOND_SAVE], "after"), 6),
        (2, "fp32", Death([SECOND_SAVE], "before", rank=1), 3),
        (3, "bf16", Death([SECOND_SAVE], "after", rank=1), 6),
        (3, "fp32", Death([("megaxelm.train.loop:export_trained", 1)]), 8),
    ],
)
def test_a_killed_training_goes_on_bit_for_bit(
    stage: int, precision: str, death: Death, resumed: int, lives: Lives, whole: Whole, seeded: dict[str, Path], tmp_path: Path
) -> None:
    whole_life, whole_run = whole(stage, precision)
    run = tmp_path / "tiny"
    shutil.copytree(seeded[precision], run)
    first = train(lives, run, stage, precision, death=death)
    assert first.codes == [-9, -9], first.output
    second = train(lives, run, stage, precision)
    assert json.loads((run / "experts" / EXPERT / "choices.json").read_text())["resumed_from_step"] == resumed
    assert faults([first, second], whole_life, STEPS * BATCH) == []
    assert outcome(run) == outcome(whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after, precision",
    [((2, 3), (1, 1), "fp32"), ((1, 0), (2, 3), "fp32"), ((2, 2), (1, 0), "fp32"), ((2, 3), (1, 0), "bf16"), ((2, 0), (2, 1), "bf16")],
)
def test_other_ranks_and_zero_stages_carry_the_deltas_over(
    before: tuple[int, int],
    after: tuple[int, int],
    precision: str,
    lives: Lives,
    whole: Whole,
    seeded: dict[str, Path],
    tmp_path: Path,
) -> None:
    whole_life, whole_run = whole(after[1], precision)
    run = tmp_path / "tiny"
    shutil.copytree(seeded[precision], run)
    first = train(lives, run, before[1], precision, ranks=before[0], death=Death([SECOND_SAVE], "after"))
    second = train(lives, run, after[1], precision, ranks=after[0])
    assert f"resumed from step 6, saved by {Layout(*before, precision)}; now {Layout(*after, precision)}" in second.output
    assert faults([first, second], whole_life, STEPS * BATCH) == []
    assert outcome(run)[0] == pytest.approx(outcome(whole_run)[0], rel=1e-5 if precision == "fp32" else 1e-2)
