"""Distillation: the teacher is the mixture under its router, and a student comes nearer to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from merge_run import branched, seed_model, small_config
from torch import Tensor

from megaxelm.corpus.packing import PackedBatch, pack
from megaxelm.corpus.sampling import Windows
from megaxelm.ensemble.routers import FixedRouter, LanguageRouter, PosteriorRouter, Request, Router
from megaxelm.errors import MergeError
from megaxelm.merge.distill import MixtureTeacher
from megaxelm.merge.make import MergeOptions, Merging
from megaxelm.model.decoder import Decoder

LENGTH = 12


@pytest.fixture(scope="module")
def experts() -> list[Decoder]:
    seed = seed_model(small_config(300))
    return [branched(seed, number, change=0.5) for number in range(3)]


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    """Three windows, of which the second has a document that begins inside."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(4, 300, (3, LENGTH + 1))
    rows, columns = np.array([0, 1, 1, 2]), np.array([0, 0, 5, 0])
    windows = Windows(tokens, rows, columns, ("de", "en", "de"), np.arange(3), np.zeros(3, np.int64))
    return pack(windows, True)


def routers() -> dict[str, Router]:
    return {
        "posterior": PosteriorRouter(3),
        "fixed": FixedRouter(["a", "b", "c"], {"a": 0.25, "c": 0.75}),
        "language": LanguageRouter(["a", "b", "c"], {"de": "a", "en": "c"}),
    }


@torch.no_grad()
def plain_mixture(experts: list[Decoder], router: Router, batch: PackedBatch, top_m: int | None) -> Tensor:
    """Log-probabilities [N, vocabulary] in fp64 from full logits, a segment at a time."""
    found = []
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = slice(start, end)
        tokens, labels = batch.tokens[part], batch.labels[part]
        count = end - start
        own = [e.logits(e(tokens, torch.arange(count), torch.tensor([0, count]))).double().log_softmax(-1) for e in experts]
        ids = [label for label in labels.tolist() if label >= 0]
        stream = torch.stack([each[torch.arange(len(ids)), torch.tensor(ids)] for each in own])
        request = Request((), batch.languages[start // LENGTH])
        log_w = router.keep(router.along(request, ids, stream if router.needs_expert_logprobs else None), top_m).dense(3).double()
        mixed = torch.stack([each[: len(ids)] + log_w[:, e, None] for e, each in enumerate(own)]).logsumexp(0)
        found.append(torch.cat([mixed, torch.full((count - len(ids), 300), torch.nan)]))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["posterior", "fixed", "language"])
@pytest.mark.parametrize("top_m", [None, 1, 2])
def test_the_teacher_is_the_mixture_under_its_router(name: str, top_m: int | None, experts: list[Decoder], batch: PackedBatch) -> None:
    router = routers()[name]
    expected = plain_mixture(experts, router, batch, top_m)
    counted = batch.labels >= 0
    assert int((~counted).sum()) == 1
    rows = MixtureTeacher(experts, router, top_m).of(batch)
    found = torch.cat([rows(slice(start, min(start + 5, 36))) for start in range(0, 36, 5)])
    assert found.shape == (36, 300)
    assert float((found - expected)[counted].abs().max()) < 1e-4
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(36), rtol=1e-4, atol=1e-4)


def test_an_expert_that_is_not_heard_is_not_run(experts: list[Decoder], batch: PackedBatch) -> None:
    class Silent(Decoder):
        def forward(self, *arguments: object, **options: object) -> Tensor:  # type: ignore[override]
            raise AssertionError("was run")

    silent = Silent(experts[1].config).eval()
    MixtureTeacher([experts[0], silent, experts[2]], routers()["fixed"], None).of(batch)(slice(0, 3))


def test_a_student_comes_nearer_to_the_mixture(experts: list[Decoder], batch: PackedBatch) -> None:
    student = seed_model(small_config(300)).train()
    teacher = MixtureTeacher(experts, routers()["posterior"], None)
    optimiser = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        output = student(batch.tokens, batch.positions, batch.cu_seqlens, labels=batch.labels, teacher=teacher.of(batch), loss_chunk_rows=7)
        output.loss_sum.backward()
        optimiser.step()
        losses.append(float(output.loss_sum.detach()) / batch.num_targets)
    assert all(loss > 0 for loss in losses), "a divergence"
    assert losses[-1] < 0.5 * losses[0]


def test_settings_of_a_distillation_that_make_no_sense_are_refused(merging: Callable[[], Merging]) -> None:
    made = merging()
    for options, text in (
        ({"label_weight": 2.0}, "--label-weight 2"),
        ({"start": "nothing"}, "--start nothing: choose average, seed, dense"),
        ({"steps": 0}, "steps = 0"),
    ):
        with pytest.raises(MergeError, match=text):
            made.make(MergeOptions("distilled", **options))  # type: ignore[arg-type]
    made.training = made.training.model_copy(update={"train": made.training.train.model_copy(update={"warmup_steps": 5})})
    with pytest.raises(MergeError, match="warmup_steps = 5 must be below the 4 steps"):
        made.make(MergeOptions("distilled", steps=4))
