"""Weights along a text: the numbers, the terminal, the picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.generation import generate
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import expert_streams
from megaxelm.ensemble.trace import COLOURS, FALLBACK_COLOUR, WeightTrace, print_weights, weight_trace, written_trace
from megaxelm.ensemble.trace_plot import _cells, _lines, plot_weights
from megaxelm.errors import RoutingError
from megaxelm.model.decoder import Decoder

MakeEnsemble = Callable[..., Ensemble]


def made_trace(fallback: str | None = None) -> WeightTrace:
    weights = torch.tensor([[0.4, 0.3, 0.3], [0.05, 0.95, 0.0], [0.0, 0.2, 0.8]], dtype=torch.float64)
    return WeightTrace("posterior", ["de", "ru", "seed"], fallback, ["Haus", " дом", "\n家"], weights)


@pytest.mark.parametrize("router", ["tfidf", "posterior", "uniform", "language"])
def test_weights_are_those_before_each_token(router: str, make_ensemble: MakeEnsemble, decoders: list[Decoder]) -> None:
    ensemble = make_ensemble(decoders)
    trace = weight_trace(ensemble, "кот ab", router, language="l2")
    ids = ensemble.tokenizer.encode(["кот ab"])[0]
    assert "".join(trace.pieces) == "кот ab" and trace.pieces[:2] == ["", "к"] and trace.weights.shape == (9, 4)
    made = ensemble.router(router)
    streams = expert_streams(ensemble.decoders, [ids], 1)[0] if made.needs_expert_logprobs else None
    assert torch.allclose(trace.weights, made.along(Request((), "l2"), ids, streams).exp())
    top = weight_trace(ensemble, ids, router, language="l2", top_m=1)
    assert (top.weights > 0).sum(-1).tolist() == [1] * 9 and top.heaviest() == trace.heaviest()


def test_what_was_written_can_be_shown_too(make_ensemble: MakeEnsemble, decoders: list[Decoder]) -> None:
    ensemble = make_ensemble(decoders)
    result = generate(ensemble, ["ab"], max_new_tokens=6, router="tfidf", stop_at_eos=False)[0]
    trace = written_trace(ensemble, "tfidf", result.token_ids, result.weights)
    assert len(trace.pieces) == 6 and trace.weights.tolist() == result.weights


def test_no_text_has_no_weights(make_ensemble: MakeEnsemble, decoders: list[Decoder]) -> None:
    with pytest.raises(RoutingError, match="the text is empty"):
        weight_trace(make_ensemble(decoders), "")


def rgb(colour: str) -> str:
    return ";".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))


def test_the_terminal_shows_each_piece_in_the_colour_of_its_heaviest_expert() -> None:
    file = io.StringIO()
    print_weights(made_trace("seed"), Console(file=file, force_terminal=True, color_system="truecolor", width=200))
    shown = file.getvalue()
    assert f"\x1b[2;38;2;{rgb(COLOURS[0])}mHaus" in shown, "faint below one half"
    assert f"\x1b[1;38;2;{rgb(COLOURS[1])}m дом" in shown, "bold from 0.9"
    assert f"\x1b[38;2;{rgb(FALLBACK_COLOUR)}m家" in shown
    legend = shown[shown.index("mean weights") :]
    assert legend.index("■ ru 0.48") < legend.index("■ seed 0.37") < legend.index("■ de 0.15")


def test_brackets_in_a_text_are_text() -> None:
    file = io.StringIO()
    print_weights(WeightTrace("uniform", ["a"], None, ["[bold]", "[/x]"], torch.ones(2, 1)), Console(file=file))
    assert "[bold][/x]" in file.getvalue()


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_the_picture_is_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{ending}"
    plot_weights(made_trace("seed"), path)
    content = path.read_bytes()
    if ending == ".png":
        assert content.startswith(b"\x89PNG")
        return
    text = content.decode()
    for word in ("Haus", "дом", "⏎家", "seed (fallback)", COLOURS[0], COLOURS[1], FALLBACK_COLOUR, "router posterior"):
        assert word in text, word
    plot_weights(made_trace("seed"), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == content


def test_bands_are_as_high_as_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: bands.append((list(x), list(low), list(high))))
    plot_weights(made_trace(), tmp_path / "x.png")
    assert [band[0] for band in bands] == [[0, 4, 8, 11]] * 3
    heights = torch.tensor([[up - down for down, up in zip(low, high, strict=True)] for _, low, high in bands], dtype=torch.float64)
    assert torch.allclose(heights[:, :3].T, made_trace().weights) and torch.allclose(heights[:, 3], heights[:, 2])


def test_long_texts_run_over_several_lines() -> None:
    assert [_cells(piece) for piece in ("", "ab", "家", "é", "\n")] == [1, 2, 2, 1, 1]
    assert _lines([50, 50, 10, 1, 200, 3]) == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_other_endings_and_nothing_to_show_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="choose .svg or .png"):
        plot_weights(made_trace(), tmp_path / "weights.pdf")
    with pytest.raises(RoutingError, match="there is no token to show"):
        plot_weights(WeightTrace("uniform", ["a"], None, [], torch.ones(0, 1)), tmp_path / "weights.png")
