"""Distances of languages from a file of the user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaxelm.cluster.typology import TypologyPartitioner
from megaxelm.corpus.document import Document
from megaxelm.errors import ClusterError
from megaxelm.recipe import TypologyConfig


def fitted(k: int, codes: list[str], distances: str) -> TypologyPartitioner:
    partitioner = TypologyPartitioner(k, TypologyConfig(distances=distances))
    partitioner.fit([Document(text=f"text in {code}", id=f"{code}/0", language=code) for code in codes])
    return partitioner


def table_file(folder: Path, text: str) -> Path:
    path = folder / "distances.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_distances_of_the_user_are_taken_for_the_languages_of_the_corpus(tmp_path: Path) -> None:
    path = str(table_file(tmp_path, "\ufeff code , en,de,xx,far\nen,0,0.5,0.3,1\nde,0.5,0,.1,1\n\nxx,0.3,1e-1,0,1\nfar,1,1,1,0\n"))
    partitioner = fitted(2, ["de", "en", "xx"], distances=path)
    assert partitioner.names == ["de-xx", "en"]
    assert partitioner.merges[0].distance == 0.1 and partitioner.median_distance == 0.3
    assert partitioner.describe()["distances"] == path and "features" not in partitioner.describe()


def test_forced_pairs_are_named_with_distances_of_the_user_too(tmp_path: Path) -> None:
    codes = ["aa", "bb", "cc", "dd", "ee", "ff"]
    table = np.full((6, 6), 0.5)
    table[0, 1] = table[1, 0] = table[2, 3] = table[3, 2] = 0.1
    table[4, :] = table[:, 4] = table[5, :] = table[:, 5] = 0.8
    table[4, 0] = table[0, 4] = table[5, 2] = table[2, 5] = 0.7
    np.fill_diagonal(table, 0)
    rows = [",".join([code, *(str(value) for value in row)]) for code, row in zip(codes, table, strict=True)]
    path = table_file(tmp_path, "\n".join([",".join(["", *codes]), *rows]))
    partitioner = fitted(3, codes, distances=str(path))
    assert partitioner.names == ["aa-bb", "cc-dd", "ee-ff"]
    assert [note.split(":")[0] for note in partitioner.notes()] == ["ee and ff are a left-over pair, not relatives"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no matrix"),
        (",en\n", "holds no matrix"),
        (",en,de\nen,0,1\n", "1 rows for 2 columns"),
        (",en,de\nen,0,1\nde,1\n", r"row 2 \(de\) has 1 values for 2"),
        (",en,de\nen,0,1,2\nde,1,0\n", r"row 1 \(en\) has 3 values for 2"),
        (",en,de\nde,0,1\nen,1,0\n", "row 1 is named 'de', but column 1 'en'"),
        (",en,\nen,0,1\n,1,0\n", "row 2 is named ''"),
        (",en,en\nen,0,1\nen,1,0\n", "en named more than once"),
        (",en,de\nen,0,x\nde,1,0\n", "row en, column de: 'x'"),
        (",en,de\nen,0,\nde,1,0\n", "row en, column de: ''"),
        (",en,de\nen,0,nan\nde,nan,0\n", "row en, column de: 'nan'"),
        (",en,de\nen,0,inf\nde,inf,0\n", "row en, column de: 'inf'"),
        (",en,de\nen,0,-1\nde,-1,0\n", "row en, column de: '-1'"),
        (",en,de\nen,0,1\nde,2,0\n", "row en, column de is 1, but row de, column en is 2"),
        (",en,de\nen,0,1\nde,1,0.5\n", "row de, column de: 0.5"),
        (",en,fr\nen,0,1\nfr,1,0\n", "no row for de; it has en, fr"),
    ],
)
def test_distances_that_are_none_are_errors_that_name_row_and_column(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=rf"clusters\.typology\.distances = .*{message}"):
        fitted(1, ["de", "en"], distances=str(table_file(tmp_path, text)))


def test_a_file_of_distances_that_is_absent_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot be read"):
        fitted(1, ["de", "en"], distances=str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match="cannot be read"):
        fitted(1, ["de", "en"], distances=str(tmp_path / "binary.csv"))
