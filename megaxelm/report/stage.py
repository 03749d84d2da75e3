"""The stage `report`: read the run directory, draw, write one HTML page."""

from __future__ import annotations

from pathlib import Path

from megaxelm.report.load import load_run


def build_report(run_folder: Path, out: Path) -> Path:
    """Write `out/index.html`, one self-contained page about the run in `run_folder`, and return its path.

    Args:
        run_folder: the run directory; `evaluation/results.json` is required, what else is absent is named in the page.
        out: existing folder to write into.

    Raises:
        StageError: `evaluation/results.json` is absent or an input is broken; the text names the file.
    """
    run = load_run(Path(run_folder))
    # matplotlib takes a second to import, and the command line imports this module for verbs that draw nothing.
    from megaxelm.report.page import render_page
    from megaxelm.report.plots import draw_figures

    target = Path(out) / "index.html"
    target.write_text(render_page(run, draw_figures(run)), encoding="utf-8")
    return target
