"""The order of the map and the families of splines: what was planted in a layer is found again."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import report
from bench.shared.chromium import Browser, why_not
from kan_layer import KANLayer
from tests.layers import random_layer
from tests.report_runs import make_run

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

INPUTS, OUTPUTS, KNOTS = 24, 30, 5
# At the knots of a grid of five: values and name.
SHAPES = {
    "nearly straight": [-2.0, -1.0, 0.0, 1.0, 2.0],
    "one hump": [0.0, 0.0, 1.0, 0.0, 0.0],
    "steep on the right": [0.0, 0.0, 0.0, 0.2, 2.0],
    "a wave": [0.0, 1.0, 0.0, 1.0, 0.0],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


def open_layer(browser: Browser, run: Path, layer: KANLayer) -> None:
    make_run(run, {5: [layer]})
    report.write_report([run])
    browser.messages()
    browser.open(run / "report.html")
    assert browser.messages() == []


def planted(points: np.ndarray) -> KANLayer:
    layer = random_layer(points.shape[0], points.shape[2], points.shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(points))
    return layer


def test_features_are_put_in_the_order_of_what_they_do(browser: Browser, tmp_path: Path) -> None:
    """Splines whose slope is the cosine between an angle of their input and one of their output."""
    generator = np.random.default_rng(0)
    rows, columns = generator.uniform(0, 2 * np.pi, INPUTS), generator.uniform(0, 2 * np.pi, OUTPUTS)
    slope = np.cos(rows[:, None] - columns)
    curve = np.linspace(-1, 1, KNOTS)[:, None] * slope[:, None]
    open_layer(browser, tmp_path / "run", planted(curve + 0.3 * generator.normal(size=curve.shape)))
    order = browser.run("return [explorer.rows, explorer.columns]")
    assert [sorted(each) for each in order] == [list(range(INPUTS)), list(range(OUTPUTS))]
    for angles, places in zip((rows, columns), order, strict=True):
        turns = np.diff(np.append(angles[places], angles[places[0]]))
        around = (turns + np.pi) % (2 * np.pi) - np.pi  # each step, the short way
        assert abs(abs(around.sum()) - 2 * np.pi) < 1e-9, "once around"
        assert np.abs(around).mean() < 2 * (2 * np.pi / len(places)), "neighbours are near each other"
    map_ = slope[np.ix_(*order)]
    assert np.abs(np.diff(map_, axis=0)).mean() < 0.6 * np.abs(np.diff(slope, axis=0)).mean()


def test_families_are_found_whatever_their_size_and_sign(browser: Browser, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    which = generator.choice(len(SHAPES), (INPUTS, OUTPUTS), p=[0.4, 0.3, 0.2, 0.1])
    size = generator.uniform(0.8, 1.2, which.shape) * generator.choice([-1, 1], which.shape)
    points = (np.array(list(SHAPES.values()))[which] * size[..., None]).transpose(0, 2, 1)
    open_layer(browser, tmp_path / "run", planted(points))
    families, member, counts = browser.run(
        """const { list, member } = familiesOf(lastLayer());
        return [list, [...member], Object.fromEntries(shapeCounts(lastLayer()))];"""
    )
    expected = {name: int((which == k).sum()) for k, name in enumerate(SHAPES)}
    assert counts == expected
    assert {name: sum(f["count"] for f in families if f["name"] == name) for name in SHAPES} == expected
    assert all(family["explained"] > 0.98 for family in families)
    assert sum(family["count"] for family in families) == which.size
    names = np.array([family["name"] for family in families])[np.array(member)].reshape(which.shape)
    assert (names == np.array(list(SHAPES))[which]).all()
    sentence = browser.run("return $('layer-sentence').textContent")
    assert sentence.startswith("Of the splines of layer 0, ")
    assert f"{round(100 * expected['one hump'] / which.size)} % have one hump" in sentence


def test_a_family_is_shown_on_the_map(browser: Browser, tmp_path: Path) -> None:
    open_layer(browser, tmp_path / "run", random_layer(INPUTS, OUTPUTS, KNOTS))
    browser.run("$('families').querySelectorAll('button')[1].click()")
    assert browser.run("return document.activeElement.getAttribute('aria-pressed')") == "true"
    opaque, count = browser.run(
        """const { cell } = explorer.grid, { I, O } = currentLayer(), context = $('map').getContext('2d');
        let opaque = 0;
        for (let row = 0; row < I; row++) for (let column = 0; column < O; column++)
          opaque += context.getImageData(column * cell, row * cell, 1, 1).data[3] === 255;
        return [opaque, familiesOf(currentLayer()).list[1].count];"""
    )
    assert opaque == count
    browser.run("$('families').querySelectorAll('button')[1].click()")
    assert browser.run("return explorer.family") is None


def test_groups_of_rows_are_named_by_what_drives_them(browser: Browser, tmp_path: Path) -> None:
    """Of 40 inputs five answer to one token; the group that they make has its name, the others none."""
    open_layer(browser, tmp_path / "run", random_layer(4, 4, 5))
    generator = np.random.default_rng(2)
    means = generator.normal(size=(3, 40))
    means[1, :5] += 4
    groups = browser.run(
        "return rowGroups([...Array(40).keys()], 40, ['a', 'b', 'c'], arguments[0])", means.ravel().tolist()
    )
    assert [[token["text"] for token in group["driving"]] for group in groups] == [["b"]] + [[]] * 7


@pytest.mark.parametrize("order", ["alike", "curved", "number"])
@pytest.mark.parametrize("color", ["rise", "curved"])
def test_every_order_and_colour_keeps_what_is_shown(browser: Browser, tmp_path: Path, order: str, color: str) -> None:
    open_layer(browser, tmp_path / "run", random_layer(INPUTS, OUTPUTS, KNOTS))
    before = browser.run("return shown()")
    browser.run(
        """for (const [id, value] of [['order', arguments[0]], ['color', arguments[1]]]) {
          $(id).value = value;
          $(id).dispatchEvent(new Event('change'));
        }""",
        order, color,
    )  # fmt: skip
    assert browser.run("return shown()") == before and browser.messages() == []
    assert browser.run("return $('map-groups').hidden") == (order != "alike")
