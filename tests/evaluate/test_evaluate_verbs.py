"""The verbs `forgetting` and `router fit`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluated import evaluate
from typer.testing import CliRunner

from megaxelm.cli import app
from megaxelm.errors import MegaxelmError
from megaxelm.recipe import Recipe, dump_recipe
from megaxelm.run import RunFolder

TABLE = "expert,ar,el\nbaseline,16,10\na,12,26\nb,20,8\n"


def test_forgetting_of_a_table_is_printed_and_written(tmp_path: Path) -> None:
    (tmp_path / "found.CSV").write_text(TABLE)
    files = ["--json", str(tmp_path / "new" / "f.json"), "--html", str(tmp_path / "other" / "f.html")]
    done = CliRunner().invoke(app, ["forgetting", str(tmp_path / "found.CSV"), *files])
    assert done.exit_code == 0 and "-25.0*" in done.output and "+16.0 perplexity" in done.output
    assert json.loads((tmp_path / "new" / "f.json").read_text())["models"]["a"]["own"] == ["ar"]
    assert "Who forgets what" in (tmp_path / "other" / "f.html").read_text()


def test_forgetting_and_router_fit_of_a_run(make_run: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = make_run("language")
    recipe = make_recipe("language")
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    with pytest.raises(MegaxelmError, match="evaluate the run first"):
        CliRunner().invoke(app, ["forgetting", str(run)], catch_exceptions=False)
    evaluate(run, recipe)
    done = CliRunner().invoke(app, ["forgetting", str(run), "--html", str(tmp_path / "f.html")])
    assert done.exit_code == 0 and "posterior mixture" in done.output and (tmp_path / "f.html").is_file()
    before = (run / "recipe.yaml").read_text()
    done = CliRunner().invoke(app, ["router", "fit", str(run), "--json", str(tmp_path / "fit.json")])
    assert done.exit_code == 0 and "posterior_decay" in done.output and (run / "recipe.yaml").read_text() == before
    done = CliRunner().invoke(app, ["router", "fit", str(run), "--router", "tfidf", "--tolerance", "100", "--write"])
    assert f"megaxelm evaluate {run}" in done.output and "your own recipe" in done.output
    found = json.loads((tmp_path / "fit.json").read_text())
    written = RunFolder(run).recipe().ensemble
    assert written.top_m == 1 and written.temperature == found["recipe"]["temperature"] != recipe.ensemble.temperature
