"""Centres of the router `tfidf`: one an expert, or one for each language of an expert."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megaxelm.corpus.document import Document
from megaxelm.ensemble.centres import Centres, grown_centres, language_centres
from megaxelm.growth import Grown


def documents(codes: str) -> list[Document]:
    return [Document(id=str(number), text="x", language=code) for number, code in enumerate(codes.split())]


def test_a_cluster_has_a_centre_for_each_language_that_it_holds_enough_of() -> None:
    codes = "de " * 30 + "el " * 3 + "fr " * 3
    assigned = np.array([0] * 29 + [1] + [0] * 3 + [1] * 3)  # the last German document has gone astray
    vectors = np.zeros((36, 4), np.float32)
    vectors[:30, 0] = 1
    vectors[30:33] = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]  # one of which nothing is known
    vectors[33:, 3] = 2
    one_each = Centres(torch.eye(4)[:3], ["a", "b", "c"])
    found = language_centres(one_each, vectors, assigned, documents(codes))
    assert found.experts == ["a", "a", "b", "c"]  # c holds nothing and keeps its own
    half = 0.5**0.5
    expected = torch.tensor([[1.0, 0, 0, 0], [0, half, half, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 0]])
    assert torch.allclose(found.vectors, expected)


def test_a_language_that_is_divided_has_a_centre_in_both_clusters() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = language_centres(Centres(torch.zeros(2, 2), ["a", "b"]), vectors, np.array([0, 0, 1]), documents("de de de"))
    assert found.experts == ["a", "b"] and torch.equal(found.vectors, torch.eye(2))


def test_centres_of_some_experts_stand_in_the_order_asked_for() -> None:
    all_of_them = Centres(torch.arange(4.0)[:, None], ["a", "a", "b", "c"])
    found = all_of_them.of(["c", "a"]) + all_of_them.of(["b"])
    assert found.experts == ["c", "a", "a", "b"] and found.vectors[:, 0].tolist() == [3.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("by_language", "experts", "expected"),
    [
        (False, ["az-uk", "pl"], [[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]),
        (True, ["az-uk", "az-uk", "pl"], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_a_grown_expert_has_a_centre_for_all_or_for_each_of_its_languages(
    tmp_path: Path, by_language: bool, experts: list[str], expected: list[list[float]]
) -> None:
    texts = {"az-uk": {"az": ["a"] * 3, "uk": ["b"] * 4, "tr": ["c"] * 5}, "pl": {"pl": ["c"], "tr": ["a"]}}
    for name, found in texts.items():
        folder = tmp_path / "grown" / name / "corpus" / "sample"
        folder.mkdir(parents=True)
        for code, lines in found.items():
            rows = [{"text": text, "id": str(number), "language": code} for number, text in enumerate(lines)]
            (folder / f"{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    space = SimpleNamespace(transform=lambda texts: np.array([[text == letter for letter in "abc"] for text in texts], np.float32))
    grown = [Grown("az-uk", ("az", "uk"), "tr", "expert", "h"), Grown("pl", ("pl",), "tr", "expert", "h")]
    centres = grown_centres(space, tmp_path, grown, 100, by_language)  # type: ignore[arg-type]
    assert centres.experts == experts and torch.allclose(centres.vectors, torch.tensor(expected))
