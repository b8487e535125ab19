"""`KANLayer.plot` draws the splines that were asked for, and leaves the user's matplotlib alone."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from pictures import sheets
from tests.layers import random_layer
from tests.runs import ROOT


@pytest.mark.parametrize("shape", [(2, 3), (40, 30), (1, 9)])
def test_everything_is_one_axes_with_every_spline(tmp_path: Path, shape: tuple[int, int]) -> None:
    layer = random_layer(*shape, knots=5)
    figure = layer.plot(everything=True, activations=torch.randn(3, 7, shape[0]), save_path=tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000
    assert len(figure.axes) == 1
    curves = [path for c in figure.axes[0].collections for path in c.get_paths() if len(path.vertices) == 5]
    assert len(curves) >= shape[0] * shape[1]
    layer.visualize_all_mappings(tmp_path / "same.png")
    assert (tmp_path / "same.png").is_file()


def panel_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text().count(" → ") == 1]


def panel_edges(figure: Figure) -> list[tuple[int, int]]:
    labels = [label for label in panel_labels(figure) if label.split(" → ")[0].isdigit()]
    return [(int(i), int(o)) for i, o in (label.split(" → ") for label in labels)]


def test_inputs_and_outputs_restrict_what_is_drawn() -> None:
    layer = random_layer(20, 30, 5)
    assert len(panel_edges(layer.plot())) == 12
    assert {i for i, _ in panel_edges(layer.plot(3))} == {3}
    assert {i for i, _ in panel_edges(layer.plot(inputs=[3]))} == {3}
    assert {o for _, o in panel_edges(layer.plot(outputs=[4, 29]))} == {4, 29}
    assert panel_edges(layer.plot([19, 0], [1, 2])) == [(19, 1), (19, 2), (0, 1), (0, 2)]
    assert len(panel_edges(layer.plot(range(8), range(8)))) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": [20]}, "inputs must be from 0 to 19; got 20"),
        ({"outputs": [2, -1]}, "outputs must be from 0 to 29; got -1"),
        ({"inputs": []}, "inputs must name at least one"),
        ({"inputs": range(8), "outputs": range(9)}, "at most 64"),
        ({"inputs": [1], "everything": True}, "leave out inputs and outputs"),
        ({"style": "sepia"}, "style must be one of light, dark, print"),
        ({"activations": torch.zeros(3, 21)}, "in_features=20"),
        ({"activations": torch.full((3, 20), math.nan)}, "finite"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_layer(20, 30, 5).plot(**arguments)


@pytest.mark.parametrize(
    ("value", "limit"), [(0, 0.1), (0.1, 0.1), (0.11, 0.2), (0.3, 0.5), (0.003, 0.005), (1, 1), (7, 10), (99.0, 100)]
)
def test_nice_limits(value: float, limit: float) -> None:
    assert sheets.nice_limit(value) == limit


def test_nothing_is_shown_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    shown: list[bool] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    layer = random_layer(2, 2, 4)
    layer.plot()
    layer.plot(everything=True)
    assert not shown and not plt.get_fignums()
    plt.switch_backend("Agg")
    layer.plot(show=True)
    assert shown == [True]
    plt.close("all")


def test_drawing_does_not_import_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from kan_layer import KANLayer; from pictures import sheets\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"KANLayer(3, 3).plot(save_path={str(tmp_path / 'sheet.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
