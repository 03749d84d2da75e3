"""docs/results.md and its picture from the JSON files of the runs, so that no figure is typed by hand.

python -m benchmarks.evidence.write benchmarks/results/evidence docs/results.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.evidence import claims, plot, tables

CLUSTERINGS = ("typology-4", "typology-8", "typology-8-centres", "typology-16", "rounds", "tfidf-4", "tfidf-8", "random-8", "lora-8")
USES = {
    "own": "own expert",
    "mixture:language": "language router",
    "mixture:tfidf": "TF-IDF router",
    "mixture:posterior": "posterior router",
    "mixture:posterior@2": "posterior, m = 2",
    "mixture:uniform": "uniform weights",
}
PICTURE = "results.svg"
RUN_ALL = Path("recipes/evidence/run.sh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.results.glob("*.json"))}
    options.page.write_text(page(runs), encoding="utf-8")
    picture = options.page.with_name(PICTURE)
    picture.write_text(plot.draw(drawn(runs)), encoding="utf-8")
    print(options.page, picture)


def drawn(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, plot.Series]:
    """What the picture shows of the runs."""
    return plot.panels(runs, [name for name in CLUSTERINGS if name in runs])


def page(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page. `runs`: name of a JSON file -> what collect.py found."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True)
    base = runs["typology-8"]
    seeds = {name: run for name, run in runs.items() if name == "typology-8" or name.startswith("typology-8-seed")}
    text = environment.get_template("page.md.j2").render(
        runs=runs,
        tables=tables,
        claims=claims.judge(runs),
        exposure=claims.exposure(base),
        documents=f"{sum(about['documents'] for about in base['languages'].values()):,}",
        clusterings={name: runs[name] for name in CLUSTERINGS if name in runs},
        seeds=seeds if len(seeds) > 1 else {},
        uses=USES,
        picture=PICTURE,
        ladder_commands=_commands(RUN_ALL, ("merge", "ladder")),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _commands(script: Path, verbs: tuple[str, ...]) -> list[str]:
    """The lines of the script that runs everything which call one of these verbs."""
    lines = script.read_text(encoding="utf-8").splitlines() if script.is_file() else []
    return [line.strip() for line in lines if line.strip().startswith(tuple(f"megaxelm {verb} " for verb in verbs))]


if __name__ == "__main__":
    main()
