"""The panel of the live model as people use it: typing, pointing, switching splines off; by keys and on a phone."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import report
from bench.shared.chromium import Browser, why_not
from model import GPT
from tests.report_runs import LETTERS, make_model_run
from tests.runs import call
from tests.test_report_page import luminance

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TEXT = "abcd abcd <e>\nfgh abab"
SETTLED = """const done = arguments[0], since = performance.now();
const look = () => {
  const busy = !live.model || live.scheduled || live.jobs.length || live.writing || performance.now() - since < 20;
  const resting = live.model?.splines.length && !$("hold").checked && predictionAt(pointed())
    && !routes.of?.startsWith(`${pointed() - 1} `);
  busy || resting ? setTimeout(look, 10) : done();
};
look();"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    folder = tmp_path_factory.mktemp("page") / "run"
    model = make_model_run(
        folder,
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=16,
        ffn="gated_splines",
        attention_gate=True,
        token_shift=True,
    )
    assert call(report.main, folder).code == 0
    return folder, model


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


@pytest.fixture
def page(browser: Browser, run: tuple[Path, GPT]) -> Iterator[Browser]:
    """The page with TEXT, `>` of which is not in the vocabulary, read and settled."""
    browser.emulate(1280, 1400)
    browser.messages()
    browser.open(run[0] / "report.html")
    browser.wait(SETTLED)
    browser.run(
        "document.documentElement.style.scrollBehavior = 'auto'; $('model').scrollIntoView();"
        "$('text').value = arguments[0]; $('text').dispatchEvent(new Event('input'))",
        TEXT,
    )
    browser.wait(SETTLED)
    yield browser
    assert browser.messages() == [], "nothing is said on the console"


def text_of(page: Browser, name: str) -> str:
    return str(page.run("return $(arguments[0]).textContent", name))


def known(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text if letter in LETTERS]


@torch.no_grad()
def probabilities(model: GPT, tokens: list[int]) -> torch.Tensor:
    """After up to block_size tokens."""
    return model(torch.tensor([tokens]))[0][0, -1].softmax(0)


def bars(page: Browser) -> dict[str, float]:
    shown = page.run("return [...$('bars').children].map((bar) => [...bar.children].map((part) => part.textContent))")
    return {letter: float(share.removesuffix(" %")) / 100 for letter, _, share in shown}


def assert_bars(page: Browser, expected: torch.Tensor) -> None:
    found = bars(page)
    assert len(found) == 10 and list(found.values()) == sorted(found.values(), reverse=True)
    for letter, share in found.items():
        token = LETTERS.index({"␣": " ", "⏎": "\n"}.get(letter, letter))
        assert share == pytest.approx(float(expected[token]), abs=6e-4)


def test_typing_shows_what_comes_next_and_the_loss(page: Browser, run: tuple[Path, GPT]) -> None:
    page.run("$('text').value = ''; $('text').dispatchEvent(new Event('input')); $('text').focus()")
    page.wait(SETTLED)
    assert "Two characters" in text_of(page, "loss") and bars(page) == {}
    page.press(*"abba cd")
    page.wait(SETTLED)
    tokens = known("abba cd")
    assert_bars(page, probabilities(run[1], tokens))
    with torch.no_grad():
        _, loss = run[1](torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    shown = re.match(r"Loss of this text: ([\d.]+) nats a character\.", text_of(page, "loss"))
    assert shown and float(shown[1]) == pytest.approx(float(loss), abs=6e-4)
    page.press("z", "a")
    page.wait(SETTLED)
    assert text_of(page, "unknown").endswith("characters do not include it: z")
    assert_bars(page, probabilities(run[1], [*tokens, 0]))


def point_at(page: Browser, place: int, click: bool = False) -> None:
    box = page.run(
        "const b = live.cells[arguments[0]].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]",
        place,
    )
    page.point(*box, click=click)
    page.wait(SETTLED)


def dots(page: Browser) -> list[list[str]]:
    found = page.run(
        "return routes.cards.map(({ dot }) => [dot.getAttribute('cx'), dot.getAttribute('cy'), dot.style.display])"
    )
    return list(found)


def test_pointing_shows_how_a_character_was_predicted(page: Browser, run: tuple[Path, GPT]) -> None:
    point_at(page, 7)
    assert text_of(page, "prediction-title") == f"How “{TEXT[7]}” was predicted"
    assert_bars(page, probabilities(run[1], known(TEXT[:7])))
    assert page.run("return $('bars').querySelector('.actual kbd').textContent") == TEXT[7]
    effects = page.run("return routes.list.map(({ effect }) => Math.abs(effect))")
    assert len(effects) == 12 and effects == sorted(effects, reverse=True) and effects[0] > 0
    assert text_of(page, "routes-title") == f"Splines that “{TEXT[7]}” went through"
    point_at(page, 0)
    assert "was not predicted" in text_of(page, "prediction-about") and all(dot[2] == "none" for dot in dots(page))


def test_what_is_pointed_at_before_it_is_read_gets_its_splines_later(page: Browser) -> None:
    page.run(
        "$('text').value = 'hgfe dcba '.repeat(40); $('text').dispatchEvent(new Event('input'));"
        "live.chosen = 5; clearTimeout(resting); routes.of = null; findRoutes()"
    )
    page.wait(SETTLED)
    assert page.run("return routes.of").startswith("4 ") and page.run("return $('routes').children.length") == 12


def test_dots_run_along_kept_curves(page: Browser) -> None:
    point_at(page, 6, click=True)
    before, names = dots(page), page.run("return routes.cards.map(({ item }) => item.textContent)")
    page.run("$('hold').click()")
    point_at(page, 3)
    assert page.run("return routes.cards.map(({ item }) => item.textContent)") == names
    assert [a[0] != b[0] for a, b in zip(before, dots(page), strict=True)].count(True) > 6
    on_curve = page.run(
        """return routes.list.map(({ layer, input, output }) => {
          const spline = live.model.splines[layer], x = live.plain.places[2].inputs[layer][input];
          return [spline.width, x, splineValue(splinePoints(spline, input, output), spline.width, x)];
        })"""
    )
    for (width, x, _), (cx, _, _) in zip(on_curve, dots(page), strict=True):
        expected = 75 + 75 * max(-1.0, min(1.0, x / (0.75 * width)))
        assert float(cx) == pytest.approx(max(4, min(146, expected)), abs=0.1)
    page.point(5, 5)
    page.wait(SETTLED)
    assert dots(page) == before, "away from the text it goes back to the chosen character"


def test_what_is_switched_off_changes_the_prediction_and_can_be_undone(page: Browser) -> None:
    point_at(page, 9, click=True)
    before, loss = bars(page), text_of(page, "loss")
    page.run("$('routes').querySelector('[aria-pressed]').click()")
    page.wait(SETTLED)
    assert page.run("return document.activeElement.getAttribute('aria-pressed')") == "true", "the focus stays"
    assert bars(page) != before and "without the changes" in text_of(page, "loss")
    marks = page.run(
        "return [...$('bars').querySelectorAll('.bar-mark')].map((mark) => parseFloat(mark.style.left) / 100)"
    )
    for share, mark in zip(bars(page), marks, strict=True):
        assert share not in before or before[share] == pytest.approx(mark, abs=6e-4)
    assert len(page.run("return live.changes")) == 1
    page.run("$('routes').querySelector('[aria-pressed=true]').click()")
    page.wait(SETTLED)
    assert bars(page) == before and text_of(page, "loss") == loss and page.run("return live.changes") == []


def test_features_and_layers_are_changed_by_number(page: Browser) -> None:
    page.run(
        "$('change-layer').value = 1; $('change-input').value = 3; $('change').querySelector('[value=off]').click()"
    )
    page.run("$('change-input').value = ''; $('change').querySelector('[value=straight]').click()")
    page.wait(SETTLED)
    names = page.run("return [...$('changes').querySelectorAll('button')].map((button) => button.textContent)")
    assert names == [
        "Block 0, feed-forward: all from input 3 off ×",
        "Block 0, feed-forward: all splines straight ×",
    ]
    page.run("$('changes').querySelector('button').click()")
    assert len(page.run("return live.changes")) == 1
    page.run("$('undo').click()")
    assert page.run("return [live.changed, $('undo').disabled, $('changes').children.length]") == [None, True, 0]
    page.run("$('change-output').value = 999; $('change').querySelector('[value=off]').click()")
    assert "has inputs 0 to 31 and outputs" in text_of(page, "change-error") and page.run("return live.changes") == []


def test_it_writes_until_it_is_stopped(page: Browser) -> None:
    page.run("live.random = () => 0.5; $('temperature').value = 0; $('write').click()")
    page.wait("const done = arguments[0], look = () => live.tokens.length > 60 ? done() : setTimeout(look, 5); look()")
    page.run("$('write').click()")
    page.wait(SETTLED)
    written = page.run("return $('text').value")
    assert written.startswith(TEXT) and len(written) > 60 and set(written[len(TEXT) :]) <= set(LETTERS)
    assert text_of(page, "speed").endswith("characters a second") and text_of(page, "write") == "Write on"
    assert page.run("return $('read-text').querySelectorAll('.next').length") == 1
    assert page.run("return [...$('read-text').children].map((cell) => cell.letter).join('')") == written.replace(
        ">", ""
    )


def test_the_text_is_walked_by_arrow_keys_and_speaks(page: Browser) -> None:
    page.run("$('read-text').focus()")
    page.press("left", "left")
    page.wait(SETTLED)
    page.wait("setTimeout(arguments[0], 350)")
    letter = TEXT[-2]
    assert re.match(rf"How “{letter}” was predicted\. After “.*”\. . [\d.]+ %, ", text_of(page, "spoken"))
    page.run("$('write').focus()")
    seen = []
    for _ in range(60):
        page.press("tab")
        name, ring = page.run(
            "const e = document.activeElement; return [e.id || e.className, getComputedStyle(e).outlineStyle]"
        )
        assert ring != "none", f"{name} has the focus and does not show it"
        seen.append(name)
        if name == "axis-step":
            break
    for wanted in ("clear", "temperature", "read-text", "hold", "change-layer", "change-input", "change-output"):
        assert wanted in seen, f"{wanted} is not reached: {seen}"


def test_a_card_leads_to_its_spline_in_the_explorer(page: Browser) -> None:
    point_at(page, 4, click=True)
    wanted = page.run("return routes.list[2]")
    page.run("$('routes').querySelectorAll('.link')[2].click()")
    assert page.run("return [explorer.layer, ...shown()]") == [wanted["layer"], wanted["input"], wanted["output"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_most_surprising_character_is_legible(page: Browser, scheme: str) -> None:
    page.emulate(1280, 1400, scheme)
    ink, shade, paper = page.run(
        """const cell = live.cells[2];
        cell.style.setProperty('--surprise', 1);
        const canvas = new OffscreenCanvas(1, 1).getContext('2d');
        const paper = getComputedStyle(document.querySelector('.live')).backgroundColor;
        for (const color of [paper, getComputedStyle(cell).backgroundColor]) {
          canvas.fillStyle = color;
          canvas.fillRect(0, 0, 1, 1);
        }
        const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
        return [getComputedStyle(cell).color, `rgb(${r}, ${g}, ${b})`, paper];"""
    )
    assert shade != paper
    lighter, darker = sorted((luminance(ink), luminance(shade)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_a_phone_has_it_within_its_width(page: Browser) -> None:
    page.emulate(390, 844, "dark", scale=2)
    page.wait(SETTLED)
    assert page.run("return document.documentElement.scrollWidth") == 390
    wide = page.run(
        "return [...document.querySelectorAll('#model *')].filter((e) => !e.closest('svg, .sr'))"
        ".filter((e) => e.getBoundingClientRect().right > 391).map((e) => e.className || e.tagName)"
    )
    assert wide == []


def test_typing_stays_smooth_while_it_reads(page: Browser) -> None:
    """No piece of work between two frames takes much longer than its slice, however long the text."""
    longest = page.run(
        """$('text').value = 'abcd efgh '.repeat(290); $('text').dispatchEvent(new Event('input'));
        const times = [];
        while (!live.plain.isDone) {
          const start = performance.now();
          live.scheduled = true; workAWhile();
          times.push(performance.now() - start);
        }
        return times.sort((a, b) => a - b)[Math.floor(times.length / 2)];"""
    )
    assert longest < 3 * 9


def test_a_model_without_splines_runs_too(browser: Browser, tmp_path: Path) -> None:
    model = make_model_run(tmp_path / "run", n_layer=1, n_head=2, n_embd=16, block_size=32, ffn="swiglu")
    assert call(report.main, tmp_path / "run").code == 0
    browser.emulate(1280, 900)
    browser.messages()
    browser.open(tmp_path / "run/report.html")
    browser.wait(SETTLED)
    browser.run("$('text').value = 'abc'; $('text').dispatchEvent(new Event('input'))")
    browser.wait(SETTLED)
    assert_bars(browser, probabilities(model, [0, 1, 2]))
    assert browser.run("return $('routes')") is None and browser.messages() == []


def test_a_run_in_progress_has_its_model_later(run: tuple[Path, GPT], tmp_path: Path) -> None:
    page = report.write_report([run[0]], tmp_path / "live.html", live=True).read_text()
    assert report.LATER in page and 'id="weights"' not in page
