"""The report's maps of functions of two inputs: where they are shown, and that they show the layer's own values."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import report
from bench.shared.chromium import Browser
from pair_layer import PairLayer
from pictures.maps import DIVERGING, SHOWN, most_interacting
from tests.report_runs import make_model_run, make_run
from tests.runs import ROOT, Result, call
from tests.test_report import Outline
from tests.test_report_page import luminance
from training.checkpoint import load_checkpoint
from training.checkpoint_files import list_steps

SMALL = {"ffn": "pair_splines", "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "attention_gate": False}
SMALL |= {"kan_variant": "balanced", "num_control_points": 4, "ffn_hidden": 6, "spline_width": 3.0}
POINTS = 60
needs_chromium = pytest.mark.needs("chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pair-run"
    make_model_run(folder, **SMALL)
    assert call(report.main, folder).code == 0
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


@pytest.fixture
def page(browser: Browser, run: Path) -> Iterator[Browser]:
    """The page, scrolled to the maps."""
    open_maps(browser, run)
    yield browser
    assert browser.messages() == [], "nothing is said on the console"


def open_maps(browser: Browser, run: Path, width: int = 1280, scheme: str = "light") -> None:
    browser.emulate(width, 900, scheme)
    browser.messages()
    browser.open(run / "report.html")
    browser.run("document.documentElement.style.scrollBehavior = 'auto'; $('maps').scrollIntoView()")
    browser.wait("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def layers(run: Path) -> list[PairLayer]:
    return [layer.double() for layer in load_checkpoint(run).model.pair_layers()]


def alone(layer: PairLayer, feature: int, output: int, places: np.ndarray) -> np.ndarray:
    """What the layer adds to `output` at the inputs `places` (N, 2) of `feature`; all other functions are zero."""
    points = torch.zeros_like(layer.control_points())
    points[feature, :, :, output] = layer.control_points()[feature, :, :, output]
    size = (layer.in_features, layer.out_features, "zero", layer.num_control_points, layer.spline_width)
    lone = PairLayer(*size, variant="B-spline").double()
    lone.set_control_points(points)
    x, z = torch.zeros(2, len(places), layer.in_features, dtype=torch.float64)
    x[:, feature], z[:, feature] = torch.from_numpy(np.asarray(places, np.float64)).T
    return lone(x, z)[:, output].detach().numpy()


def shown_data(page: str) -> dict:
    return json.loads(page.partition("const DATA = ")[2].partition(";</script>")[0])["maps"]


def test_a_run_with_functions_of_two_inputs_shows_those_furthest_from_a_sum(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    maps = shown_data(page)
    assert maps["run"] == "pair-run" and maps["step"] == 10 and len(maps["blocks"]) == 2
    for layer, block in zip(layers(run), maps["blocks"], strict=True):
        values = layer.control_points().detach().float().numpy().transpose(0, 3, 1, 2)
        expected = most_interacting(values, SHOWN)
        for one, view in zip(block["functions"], expected, strict=True):
            assert (one["feature"], one["output"]) == (view.feature, view.output)
            np.testing.assert_allclose(np.reshape(one["values"], view.values.shape), view.values, atol=1e-6)
        assert block["limit"] == pytest.approx(max(np.abs(view.values).max() for view in expected))
    outline = Outline()
    outline.feed(page)
    assert not outline.disorder and not outline.open and outline.references <= set(outline.ids)
    assert {"maps", "maps-list", "maps-block"} <= set(outline.ids) and '<a href="#maps">' in page
    assert "gated layers of functions of two inputs" in page and "pair-run at step 10" in page
    assert re.search(r"python plot.py \S+pair-run --maps True", page)


@pytest.mark.parametrize("ffn", ["mlp", "gated_splines"])
def test_other_runs_have_no_maps(tmp_path: Path, ffn: str) -> None:
    make_model_run(tmp_path / "run", ffn=ffn)
    assert call(report.main, tmp_path / "run").code == 0
    assert_no_maps(tmp_path / "run")
    assert "--maps" not in (tmp_path / "run" / "report.html").read_text()


def assert_no_maps(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="maps"' not in page and '"#maps"' not in page and shown_data(page) is None
    assert 'id="curves"' in page and 'id="samples"' in page, "the rest is there"


def test_maps_stand_beside_the_splines_of_attention_gates(tmp_path: Path) -> None:
    make_model_run(tmp_path / "run", **{**SMALL, "attention_gate": True})
    assert call(report.main, tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="splines"' in page and 'id="maps"' in page and "--film" in page and "--maps True" in page


def test_of_several_runs_the_first_with_such_functions_is_shown_and_named(tmp_path: Path, run: Path) -> None:
    splines = tmp_path / "one-input"
    make_model_run(splines, ffn="gated_splines")
    assert call(report.main, splines, run, "--output", tmp_path / "both.html").code == 0
    page = (tmp_path / "both.html").read_text()
    assert 'id="splines-title"' in page and "function of pair-run at step 10" in page


def report_without_maps(run: Path) -> Result:
    result = call(report.main, run)
    assert result.code == 0 and f"{run}: no functions of two inputs to show" in result.out
    assert_no_maps(run)
    return result


def test_a_page_without_a_usable_checkpoint_is_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {0: [], 10: []}, **SMALL)
    assert "has no checkpoint latest" in report_without_maps(run).out
    make_model_run(tmp_path / "damaged", **SMALL)
    list_steps(tmp_path / "damaged")[0].write_bytes(b"no checkpoint")
    assert "is damaged" in report_without_maps(tmp_path / "damaged").out


def test_values_that_are_not_finite_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*arguments: object, real=load_checkpoint):
        checkpoint = real(*arguments)
        with torch.no_grad():
            checkpoint.model.pair_layers()[1].weight[0, 0, 0] = float("nan")
        return checkpoint

    make_model_run(tmp_path / "run", **SMALL)
    monkeypatch.setattr(report, "load_checkpoint", poisoned)
    assert "block 1" in report_without_maps(tmp_path / "run").out


def test_a_page_of_a_run_in_progress_reads_no_checkpoint(tmp_path: Path) -> None:
    make_model_run(tmp_path / "run", **SMALL)
    report.write_report([tmp_path / "run"], live=True)
    assert_no_maps(tmp_path / "run")


def test_the_light_colours_are_those_of_the_pictures() -> None:
    styles = (ROOT / "webpage/assets/report.css").read_text()
    assert tuple(re.findall(r"--map-\d: (#\w{6})", styles)[:5]) == DIVERGING


@needs_chromium
@pytest.mark.parametrize("points", [2, 5])
def test_values_between_knots_are_the_layers_own(browser: Browser, tmp_path: Path, points: int) -> None:
    make_model_run(tmp_path / "run", **{**SMALL, "num_control_points": points})
    assert call(report.main, tmp_path / "run").code == 0
    open_maps(browser, tmp_path / "run")
    generator = np.random.default_rng(points)
    for number, layer in enumerate(layers(tmp_path / "run")):
        places = generator.uniform(-0.5, 0.5, (POINTS, 2)) * layer.spline_width
        places[:4] = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * layer.spline_width / 2
        found = browser.run(
            """const block = DATA.maps.blocks[arguments[0]];
            return block.functions.map(({ feature, output, values }) =>
              [feature, output, arguments[1].map(([x, z]) => pairValue(values, block, x, z))]);""",
            number, places.tolist(),
        )  # fmt: skip
        assert len(found) == SHOWN
        for feature, output, values in found:
            np.testing.assert_allclose(values, alone(layer, feature, output, places), atol=1e-6, rtol=0)


def field_box(page: Browser, number: int) -> dict[str, float]:
    return dict(
        page.run(
            """const b = document.querySelectorAll('.field')[arguments[0]].getBoundingClientRect();
            return { x: b.x, y: b.y, w: b.width, h: b.height };""",
            number,
        )
    )


def reading(page: Browser, number: int) -> list[float]:
    """Value and place that a map's text says, or the function's range."""
    text = page.run("return document.querySelectorAll('#maps output')[arguments[0]].textContent", number)
    return [float(word.replace("−", "-")) for word in re.findall(r"−?[\d.]+(?:e−?\d+)?", text)]


@needs_chromium
def test_pointing_reads_the_layers_value(page: Browser, run: Path) -> None:
    (block, *_) = shown_data((run / "report.html").read_text())["blocks"]
    before = reading(page, 3)
    values = block["functions"][3]["values"]
    np.testing.assert_allclose(before, [min(values), max(values)], rtol=0.06)
    box, layer, one = field_box(page, 3), layers(run)[0], block["functions"][3]
    x, y = round(box["x"] + 0.8 * box["w"]), round(box["y"] + 0.3 * box["h"])
    page.point(x, y)
    place = ((x - box["x"]) / box["w"] - 0.5) * 3, (0.5 - (y - box["y"]) / box["h"]) * 3  # now across, before up
    value, *where = reading(page, 3)
    np.testing.assert_allclose(where, place, atol=0.006)
    (expected,) = alone(layer, one["feature"], one["output"], np.array([place]))
    assert value == pytest.approx(expected, rel=0.006, abs=1e-4)
    page.point(5, y)
    assert reading(page, 3) == before


@needs_chromium
def test_keys_read_the_centre_and_walk_by_half_cells_within_the_grid(page: Browser, run: Path) -> None:
    layer, functions = layers(run)[0], shown_data((run / "report.html").read_text())["blocks"][0]["functions"]
    page.run("$('maps-block').focus()")
    page.press("tab")
    ring = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert page.run("return document.activeElement.className") == "field" and ring != "none"
    for keys, place in (((), (0, 0)), (("right", "up", "up"), (0.5, 1)), (("down",) * 9, (0.5, -1.5))):
        page.press(*keys)
        value, *where = reading(page, 0)
        (expected,) = alone(layer, functions[0]["feature"], functions[0]["output"], np.array([place]))
        assert where == list(place) and value == pytest.approx(expected, rel=0.006, abs=1e-4)
    page.press("tab")
    assert len(reading(page, 0)) == 2 and reading(page, 1)[1:] == [0, 0], "the next map reads its centre"


@needs_chromium
def test_pixels_have_the_colour_of_the_layers_value(page: Browser, run: Path) -> None:
    """Every ninth pixel of a map, against colours between those of the pictures."""
    layer, block = layers(run)[1], shown_data((run / "report.html").read_text())["blocks"][1]
    page.run("$('maps-block').value = 1; $('maps-block').dispatchEvent(new Event('change'))")
    side, pixels = page.run(
        """const canvas = document.querySelectorAll('.field canvas')[5];
        return [canvas.width, [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.width).data]];"""
    )
    places = ((np.arange(0, side, 9) + 0.5) / side - 0.5) * layer.spline_width
    across, up = np.meshgrid(places, -places)  # the first row is at the top
    one = block["functions"][5]
    values = alone(layer, one["feature"], one["output"], np.stack((across.ravel(), up.ravel()), axis=1))
    stops = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in DIVERGING])
    wanted = [np.interp(values / block["limit"], np.linspace(-1, 1, 5), stops[:, channel]) for channel in range(3)]
    found = np.reshape(pixels, (side, side, 4))[::9, ::9].reshape(-1, 4)
    np.testing.assert_allclose(found[:, :3], np.transpose(wanted), atol=2)
    assert (found[:, 3] == 255).all() and np.ptp(found[:, 0]) > 40


@needs_chromium
def test_another_block_has_its_own_functions_and_scale(page: Browser, run: Path) -> None:
    blocks = shown_data((run / "report.html").read_text())["blocks"]
    for number in (0, 1):
        page.run("$('maps-block').value = arguments[0]; $('maps-block').dispatchEvent(new Event('change'))", number)
        names, low, high, about = page.run(
            """return [[...document.querySelectorAll('.pair figcaption')].map((e) => e.textContent),
            $('maps-low').textContent, $('maps-high').textContent, $('maps-caption').textContent]"""
        )
        assert names == [f"{one['feature']} → {one['output']}" for one in blocks[number]["functions"]]
        assert float(high) == pytest.approx(blocks[number]["limit"], rel=0.06) and low == f"−{high}"
        assert about == "12 of its 48 functions"


@needs_chromium
def test_every_map_says_in_words_what_it_shows(page: Browser, run: Path) -> None:
    block = shown_data((run / "report.html").read_text())["blocks"][0]
    labels = page.run("return [...document.querySelectorAll('.field')].map((e) => e.getAttribute('aria-label'))")
    assert len(labels) == SHOWN
    for label, one in zip(labels, block["functions"], strict=True):
        assert label.startswith(f"Input feature {one['feature']} now and one token before, to output feature")
        values = np.reshape(one["values"], (4, 4))
        now, before = np.unravel_index(values.argmax(), values.shape)
        found = re.search(r"highest (\S+) at now (\S+) and before ([^,]+),", label)
        assert found
        high, x, z = (float(word.replace("−", "-")) for word in found.groups())
        assert high == pytest.approx(values.max(), rel=0.006)
        assert (x, z) == (now - 1.5, before - 1.5), "knots lie at ±1.5 and ±0.5"


def luminance_of(page: Browser, selector: str, what: str = "color") -> float:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return luminance(page.run(script, selector, what))


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_maps_are_legible_and_their_zero_is_like_the_page(browser: Browser, run: Path, scheme: str) -> None:
    open_maps(browser, run, scheme=scheme)
    paper = luminance_of(browser, ".panel", "backgroundColor")
    for selector in (".pair figcaption", ".pair output", ".pair .now", ".pair .before"):
        lighter, darker = sorted((luminance_of(browser, selector), paper), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector
    middle = browser.run("return ramp(MAP_COLORS)[128].slice(0, 3)")
    assert abs(luminance(f"rgb{tuple(middle)}") - paper) < 0.1


@needs_chromium
def test_maps_are_painted_again_in_another_theme(page: Browser) -> None:
    picture = "return document.querySelector('.field canvas').toDataURL()"
    light = page.run(picture)
    page.run("setTheme('dark')")
    assert page.run(picture) != light
    page.run("setTheme('auto')")
    assert page.run(picture) == light


@needs_chromium
def test_a_phone_shows_maps_without_scrolling_sideways(browser: Browser, run: Path) -> None:
    open_maps(browser, run, width=390)
    assert browser.run("return document.documentElement.scrollWidth") == 390
    assert field_box(browser, 0)["w"] > 100
    assert browser.run("return performance.getEntriesByType('resource').length") == 0, "nothing is fetched"
