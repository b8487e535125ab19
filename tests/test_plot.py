"""plot.py draws a spline, a layer or a film from the run's records."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plot
import train
from pictures import film
from pictures.film import Moment, between
from splines.records import SplineRecords
from splines.views import SplineView, view_splines
from tests.layers import random_layer
from tests.report_runs import look_at, make_run
from tests.runs import assert_one_sentence, call, make_dataset, options
from training.run_splines import splines_at


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two layers and three steps, whose grid is refined after the first."""
    layers = {
        step: [random_layer(6, 7, knots, seed=step + k) for k in (0, 1)] for step, knots in ((0, 3), (10, 5), (20, 5))
    }
    return make_run(tmp_path_factory.mktemp("plot") / "run", layers)


def values_at(view: SplineView, x: np.ndarray) -> np.ndarray:
    """The spline at x by NumPy's interpolation, with its outer pieces extended far beyond the grid."""
    knots = np.linspace(-view.spline_width / 2, view.spline_width / 2, len(view.control_points))
    points = view.control_points.astype(np.float64)
    far = 1000.0
    left = points[0] - far * (points[1] - points[0]) / (knots[1] - knots[0])
    right = points[-1] + far * (points[-1] - points[-2]) / (knots[-1] - knots[-2])
    return np.interp(x, [knots[0] - far, *knots, knots[-1] + far], [left, *points, right])


def test_a_film_shows_every_step_and_holds_the_last(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "DPI", 40)
    monkeypatch.setattr(film, "BETWEEN", 1)
    for name in ("film.gif", "film.png"):
        assert call(plot.main, "--film", run, "--output", tmp_path / name, "--count", 3).code == 0
        with Image.open(tmp_path / name) as picture:
            frames = [np.asarray((picture.seek(k), picture.convert("RGB"))[1]).copy() for k in range(picture.n_frames)]
            assert picture.is_animated
        assert len(frames) >= 5, "three steps and one between each"
        assert all((a != b).any() for a, b in itertools.pairwise(frames))


def test_frames_between_two_steps_are_on_the_way_even_if_the_grid_changes() -> None:
    old, new = look_at(random_layer(2, 2, 3, seed=1)), look_at(random_layer(2, 2, 9, width=5.0, seed=2))
    first, second = (view_splines(snapshot, [(1, 0)]) for snapshot in (old, new))
    moments = between(Moment(100, "step 100", first), Moment(200, "step 200", second))
    assert moments[0].views is first and len(moments) == 1 + film.BETWEEN
    assert all(moment.label == "step 100 → 200" for moment in moments[1:])
    x = np.linspace(-2.5, 2.5, 9)  # the new knots
    for moment in moments[1:]:
        share = (moment.step - 100) / 100
        expected = (1 - share) * values_at(first[0], x) + share * values_at(second[0], x)
        np.testing.assert_allclose(values_at(moment.views[0], x), expected, atol=1e-6)


def test_one_spline_a_sheet_and_vectors(run: Path, tmp_path: Path) -> None:
    for name, arguments in {
        "one.svg": ["--layer", 1, "--inputs", 3, "--outputs", 4, "--style", "dark"],
        "four.pdf": ["--layer", 0, "--inputs", "1,2", "--outputs", "3,4", "--style", "print"],
        "all.svg": ["--layer", 0, "--everything"],
    }.items():
        result = call(plot.main, run, *arguments, "--output", tmp_path / name)
        assert result.code == 0 and result.out.strip() == str(tmp_path / name), result
    text = (tmp_path / "one.svg").read_text()
    assert text.count("<image") == 0 and "#14171c" in text, "vectors, on dark paper"
    assert (tmp_path / "four.pdf").read_bytes().startswith(b"%PDF")
    named = call(plot.main, run, "--layer", 1, "--inputs", 3, "--outputs", 4)
    assert Path(named.out.strip()).name == "layer_01_in3_out4.png" and Path(named.out.strip()).is_file()


def test_a_step_whose_checkpoint_is_gone_is_drawn_from_its_record(run: Path) -> None:
    assert not (run / "checkpoints").exists()
    result = call(plot.main, run, "--step", 10)
    assert result.code == 0
    assert {Path(line).name for line in result.out.split()} == {"layer_00.png", "layer_01.png", "overview.png"}
    assert all("step_000010" in line and Path(line).is_file() for line in result.out.split())


def test_the_basis_figure_needs_no_run(tmp_path: Path) -> None:
    assert call(plot.main, "basis", "--output", tmp_path / "basis.svg").code == 0
    assert "<svg" in (tmp_path / "basis.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--inputs", "3"], ["--layer"]),
        (["--layer", "0", "--inputs", "3;4"], ["inputs", "3,17"]),
        (["--layer", "0", "--inputs", "6", "--step", "10"], ["inputs", "0 to 5"]),
        (["--film", "--layer", "2"], ["layer", "0 to 1"]),
        (["--film", "--output", "a.avi"], [".gif"]),
        (["--style", "sepia"], ["style", "light"]),
        (["--step", "10", "--layer", "2"], ["0 to 1"]),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(run: Path, arguments: list[str], parts: list[str]) -> None:
    assert_one_sentence(call(plot.main, run, *arguments), *parts)


def test_a_film_needs_two_steps_and_a_video_ffmpeg(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = make_run(tmp_path / "short", {5: [random_layer(3, 3, 4)]})
    assert_one_sentence(call(plot.main, short, "--film"), "1 steps", "two")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert_one_sentence(call(plot.main, run, "--film", "--output", tmp_path / "a.mp4"), "ffmpeg", ".gif")


def test_a_notebook_shows_a_figure_as_it_is() -> None:
    layer = random_layer(4, 4, 5)
    figure = layer.plot(2, 3)
    assert figure._repr_png_().startswith(b"\x89PNG")
    dark = layer.plot(style="dark")
    assert dark.get_facecolor()[:3] < (0.2, 0.2, 0.2)


def test_a_layer_too_large_for_its_record_is_drawn_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splines.records.MAX_VALUES", 200)
    arguments = options(make_dataset(tmp_path / "words"), tmp_path / "run", splines=True)
    assert call(train.main, *arguments).code == 0
    (partial,) = SplineRecords(tmp_path / "run").read(12)
    assert not partial.is_whole and partial.control_points.size <= 200
    _, _, (snapshot,) = splines_at(tmp_path / "run", "latest")
    assert snapshot.is_whole
    _, _, (earlier,) = splines_at(tmp_path / "run", "0")
    assert not earlier.is_whole, "its checkpoint is gone, or never was"
