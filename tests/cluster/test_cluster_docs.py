"""What `docs/clusters.md` shows is what comes out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from megaxelm.cluster import uriel
from megaxelm.cluster.analyzers import WordAnalyzer
from megaxelm.cluster.distance_table import read_distances
from megaxelm.cluster.mapping import MappingPartitioner
from megaxelm.cluster.typology import TypologyPartitioner
from megaxelm.corpus.document import Document
from megaxelm.recipe import ClustersConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first column has this heading, without head and rule."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_words_shown_are_those_the_published_pattern_finds() -> None:
    table = rows("language")
    assert [row[0] for row in table] == ["English", "Vietnamese", "Korean", "Hindi", "Thai", "Chinese", "Japanese"]
    for _, text, words in table:
        assert re.findall(r"`([^`]+)`", words) == WordAnalyzer().words(text)


def test_every_partitioner_of_the_recipe_is_in_the_table_and_needs_k_as_it_says() -> None:
    kinds = {row[0].strip("`"): row[2] for row in rows("`clusters.partitioner`")}
    assert sorted(kinds) == sorted(get_args(ClustersConfig.model_fields["partitioner"].annotation))
    for kind, k in kinds.items():
        settings = {"partitioner": kind, "mapping": {"a": ["en"]} if kind == "mapping" else {}}
        if k == "required":
            with pytest.raises(ValueError, match="k is missing"):
                ClustersConfig.model_validate(settings)
        else:
            ClustersConfig.model_validate(settings)


def test_the_forced_pairs_named_are_the_forced_ones() -> None:
    partitioner = TypologyPartitioner(8)
    partitioner.fit([Document("x", code, code) for code in "ar bg de el en es fr hi ja ko ru sw tr ur vi zh".split()])
    forced = [merge for merge in partitioner.merges if merge.forced]
    assert [(sorted(merge.left + merge.right), f"{merge.distance:.3f}") for merge in forced] == [
        (["tr", "zh"], "0.460"),
        (["sw", "vi"], "0.576"),
    ]
    assert "Turkish with Chinese (.460) and Swahili with Vietnamese (.576)" in PAGE


def test_the_examples_can_be_read(tmp_path: Path) -> None:
    import yaml

    blocks = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
    table = next(text for _, text in blocks if text.startswith(",en"))
    (tmp_path / "my.csv").write_text(table)
    assert read_distances(tmp_path / "my.csv", ["sw", "en"]).tolist() == [[0, 0.7], [0.7, 0]]
    config = ClustersConfig.model_validate(yaml.safe_load(next(text for kind, text in blocks if kind == "yaml"))["clusters"])
    assert config.num_clusters == 2 and list(MappingPartitioner(config.mapping).groups) == ["slavic", "rest"]
    for source in ("average", "knn", "wals", "sswl", "ethnologue", "phoible_spa"):
        assert uriel.distances(["en", "fr"], f"{'inventory' if 'phoible' in source else 'syntax'}_{source}").shape == (2, 2)


def test_the_commands_for_donors_run(capsys: pytest.CaptureFixture[str]) -> None:
    from megaxelm.cli import app

    commands = re.findall(r"^megaxelm (cluster donors .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        app(command.split(), standalone_mode=False)
    assert len(capsys.readouterr().out.splitlines()) == 5
