"""Pictures are drawn with the project's own settings. The user's matplotlibrc or style does not change them."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from matplotlib import style

from bench.grids import Entry, draw_grids
from bench.shared.case import Case
from bench.shared.grid_plot import draw_losses_by_grid
from bench.shared.layer_plot import draw_times
from bench.shared.race import Curve
from bench.shared.race_plot import draw_race
from bench.shared.result import Measurement, Result
from pictures.film import write_film
from pictures.hats import draw_basis
from pictures.overview import draw_overview
from pictures.page import matplotlib_defaults
from pictures.run_pictures import save_picture
from pictures.sheets import draw_snapshot
from splines.views import layer_view, view_splines
from tests.layers import random_layer
from tests.report_runs import look_at, make_run
from tests.runs import run_command

# Settings that people use. LaTeX need not be installed, because our pictures must not use it.
WILD = {
    "text.usetex": True,
    "font.family": "serif",
    "font.size": 20,
    "text.antialiased": False,
    "text.color": "red",
    "axes.facecolor": "yellow",
    "axes.grid": True,
    "axes.unicode_minus": False,
    "axes.formatter.use_locale": True,
    "lines.linewidth": 7,
    "lines.antialiased": False,
    "lines.dashed_pattern": (9, 9),
    "patch.antialiased": False,
    "path.sketch": (2, 90, 2),
    "xtick.direction": "in",
    "image.interpolation": "bicubic",
    "image.origin": "lower",
    "figure.autolayout": True,
    "figure.dpi": 31,
    "savefig.bbox": "tight",
    "savefig.dpi": 37,
    "savefig.facecolor": "orange",
    "savefig.transparent": True,
}
SNAPSHOT = look_at(random_layer(12, 11, 5, seed=0))
VIEWS = view_splines(SNAPSHOT, [(1, 2), (3, 4), (5, 6)])
CURVES = [Curve(name, 1, 9, [1, 9], [0.1, 0.9], [2.0, last]) for name, last in (("a", 1.0), ("b", 1.5))]
GRID_CURVES = [
    Curve(str(grid), 1, 9, losses=[1 / (grid + 1)], splines="splines" * bool(grid), control_points=grid)
    for grid in (0, 3, 9)
]
ENTRIES = [Entry("plain", grid, 1, "", 9, [1, 9], [2.0, 1.0 + grid / 9]) for grid in (5, 8)]
TIMED = Measurement(1.0, 9, 1.0, 1.0, 1.0, 0.5, 0.5, 0.2)
TIMES = [
    Result(Case(64, 64, grid, "float32"), name, 9, TIMED, TIMED, None, None)
    for name in ("mlp", "native")
    for grid in (5, 8)
]
PICTURES: dict[str, Callable[[Path], object]] = {
    "sheet": lambda path: save_picture(draw_snapshot(SNAPSHOT), path),
    "spline": lambda path: save_picture(draw_snapshot(SNAPSHOT, 3, 4), path),
    "every spline": lambda path: save_picture(draw_snapshot(SNAPSHOT, everything=True), path),
    "overview": lambda path: save_picture(draw_overview([layer_view(SNAPSHOT, 3)], "title", 1.0, 1.0), path),
    "basis": lambda path: save_picture(draw_basis(), path),
    "film": lambda path: write_film(path, [(0, VIEWS[:1]), (5, VIEWS[1:2])], "title"),
    "KANLayer.plot": lambda path: random_layer(3, 3, 4, seed=0).plot(save_path=path),
    "notebook": lambda path: path.write_bytes(random_layer(3, 3, 4, seed=0).plot()._repr_png_()),
    "losses by grid": lambda path: save_picture(draw_losses_by_grid(GRID_CURVES, "title", "where"), path),
    "race": lambda path: save_picture(draw_race(CURVES, "title", "where"), path),
    "grids": lambda path: save_picture(draw_grids(ENTRIES, "where"), path),
    "layer times": lambda path: save_picture(draw_times(TIMES, "where"), path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_whatever_the_user_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("pictures.film.BETWEEN", 1)
    monkeypatch.setattr("pictures.film.HOLD_S", 0.1)
    with matplotlib_defaults():
        PICTURES[name](tmp_path / "plain.png")
    with matplotlib.rc_context():
        style.use(["dark_background", WILD])
        before = dict(matplotlib.rcParams)
        PICTURES[name](tmp_path / "wild.png")
        assert dict(matplotlib.rcParams) == before, "the user's settings are left as they were"
    assert (tmp_path / "wild.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_plot_py_draws_under_a_matplotlibrc_and_a_backend_of_the_user_s(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\nfont.family: serif\n")
    environment = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://not_installed_here"}
    run = make_run(tmp_path / "run", {step: [random_layer(2, 2, 3, seed=step)] for step in (0, 10)})
    arguments = ["--film", "--layer", 0, "--count", 1, "--output", tmp_path / "film.gif"]
    assert run_command("plot.py", run, *arguments, env=environment).code == 0
    assert (tmp_path / "film.gif").stat().st_size > 0
