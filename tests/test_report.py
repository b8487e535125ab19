"""The report holds the layer's values within its budget, for every kind of run, and loads nothing from elsewhere."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import report
import train
from splines.records import SplineRecords
from splines.snapshot import VISIBLE
from tests.layers import random_layer
from tests.report_runs import make_run
from tests.runs import assert_one_sentence, call, make_dataset, options
from training.config import parse
from webpage import build
from webpage.packing import fixed_point, fixed_point_scale, pack, pack_layer, spread_with_last
from webpage.run_data import read_run, thinned


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(1, 3)),
    width=st.floats(0.5, 20),
    scale=st.sampled_from([1e-6, 0.01, 0.3, 1, 5, 100]),
    seed=st.integers(0, 999),
)
def test_the_packed_splines_are_the_layers_own_to_a_millionth(shape, width, scale, seed):
    inputs, knots, outputs = shape
    layer = random_layer(inputs, outputs, knots, width, seed=seed, scale=scale)
    parts = bytearray()
    where = pack_layer(layer.snapshot(), parts)
    if where["scale"] is None:
        points = np.frombuffer(parts, "<f4", inputs * knots * outputs, where["points"]).astype(np.float64)
    else:
        raw = (
            np.frombuffer(parts, np.uint8, 3 * inputs * knots * outputs, where["points"])
            .reshape(-1, 3)
            .astype(np.int64)
        )
        points = ((raw[:, 0] | raw[:, 1] << 8 | raw[:, 2] << 16) - (1 << 23)) * where["scale"]
    packed = random_layer(inputs, outputs, knots, width).double()
    with torch.no_grad():
        packed.weight.copy_(torch.from_numpy(points.reshape(inputs, knots, outputs)))
    x = (2 * torch.rand(50, inputs, dtype=torch.float64) - 1) * VISIBLE * width
    expected = layer.double()(x)
    torch.testing.assert_close(packed(x), expected, atol=1e-6 * inputs, rtol=0)


def test_fixed_point_takes_three_bytes_and_the_extremes() -> None:
    points = np.array([-0.5, 0.0, 0.5], np.float32).reshape(1, 3, 1)
    scale = fixed_point_scale(points)
    assert scale is not None
    whole = np.frombuffer(fixed_point(points, scale), np.uint8).reshape(3, 3)
    values = [int.from_bytes(bytes(row), "little") for row in whole]
    assert values == [1, 1 << 23, (1 << 24) - 1]
    assert fixed_point_scale(np.full((1, 3, 1), 1e3)) is None, "large values need all of float32"


@pytest.mark.parametrize(
    ("budget", "steps_kept", "is_whole"), [(600_000, 9, True), (400_000, 6, True), (200_000, 6, False)]
)
def test_a_page_keeps_to_its_budget_and_the_first_and_last_steps(
    tmp_path: Path, budget: int, steps_kept: int, is_whole: bool
) -> None:
    steps = range(0, 900, 100)
    run = make_run(tmp_path / "run", {step: [random_layer(40, 60, 5, seed=step, scale=0.3)] for step in steps})
    packed = pack(SplineRecords(run), read_run(run).tokenizer, budget)
    assert packed is not None
    assert sum(map(len, packed.blocks.values())) <= budget
    there = [step["step"] for step in packed.metadata["steps"]]
    assert there[0] == 0 and there[-1] == 800 and len(there) >= steps_kept
    (layer,) = packed.metadata["layers"]
    assert is_whole == (len(layer["inputs"]) == 40 and len(layer["outputs"]) == 60)
    newest = base64.b64decode(packed.blocks[packed.metadata["steps"][-1]["block"]])
    where = packed.metadata["steps"][-1]["layers"][0]
    expected = bytearray()
    places = (np.array(layer["inputs"]), np.array(layer["outputs"]))
    assert pack_layer(SplineRecords(run).read(800)[0].block(*places), expected) == where and bytes(expected) == newest


def test_a_step_that_the_model_shares_is_kept_whole(tmp_path: Path) -> None:
    """Rather all features at few steps than few features at many."""
    steps = range(0, 900, 100)
    run = make_run(tmp_path / "run", {step: [random_layer(40, 60, 5, seed=step)] for step in steps})
    packed = pack(SplineRecords(run), read_run(run).tokenizer, 200_000, whole=True)
    assert packed is not None and sum(map(len, packed.blocks.values())) <= 200_000
    assert [step["step"] for step in packed.metadata["steps"]][-1] == 800 and len(packed.metadata["steps"]) < 6
    assert len(packed.metadata["layers"][0]["inputs"]) == 40 and len(packed.metadata["layers"][0]["outputs"]) == 60


def test_steps_are_spread_evenly() -> None:
    assert spread_with_last(9, 9) == list(range(9))
    assert spread_with_last(9, 3) == [0, 4, 8]
    assert spread_with_last(9, 1) == [8]


def test_a_report_fetches_nothing_and_no_text_escapes_from_it(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{title}} "
    run = make_run(tmp_path / "a<b>&run", {0: [random_layer(6, 6, 5)], 5: [random_layer(6, 6, 5)]}, sample=evil)
    result = call(report.main, run)
    assert result.code == 0 and result.out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    addresses = set(re.findall(r"""https?://[^"'\s<)]+""", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a namespace is a name, not a place"
    assert not re.findall(r"<(?:link|img|iframe|script[^>]+src)", page)
    assert "alert(1)</script>" not in page and "<b>" not in page
    assert page.count("</script>") == page.count("<script")
    assert "{{" not in page.replace("{{title}} ", ""), "templates are filled"


class Outline(HTMLParser):
    """What a page is made of: its identifiers, what refers to them, and elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.open: list[str] = []
        self.disorder: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids += [values["id"]] if values.get("id") else []
        self.references |= set((values.get("aria-labelledby") or "").split())
        self.references |= {values["href"][1:]} if (values.get("href") or "").startswith("#") else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass  # of SVG: closes itself

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.disorder.append(f"</{tag}> at line {self.getpos()[0]}")


VOID = {"meta", "br", "input", "img", "hr", "link"}


def test_the_page_uses_all_its_parts_and_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(text: str, parts: dict[str, str], real=build.fill) -> str:
        assert set(re.findall(r"{{(\w+)}}", text)) == set(parts), "a part without a place is shown nowhere"
        return real(text, parts)

    monkeypatch.setattr(build, "fill", fill)
    run = make_run(tmp_path / "run", {0: [random_layer(6, 6, 5)], 5: [random_layer(6, 6, 5)]})
    assert call(report.main, run).code == 0
    outline = Outline()
    outline.feed((run / "report.html").read_text(encoding="utf-8"))
    assert not outline.disorder and not outline.open
    assert len(set(outline.ids)) == len(outline.ids) > 10
    assert outline.references <= set(outline.ids)


def test_runs_are_compared_and_splines_come_from_the_one_that_has_them(tmp_path: Path) -> None:
    twin = make_run(tmp_path / "twin", {0: [], 10: []}, ffn="mlp")
    kan = make_run(tmp_path / "kan", {0: [random_layer(6, 6, 5)], 10: [random_layer(6, 6, 5)]})
    output = tmp_path / "both.html"
    assert call(report.main, twin, kan, "--output", output).code == 0
    page = output.read_text()
    assert "2 training runs side by side" in page and 'id="splines-10"' in page
    assert "class=differs" in page, "ffn differs"


def test_runs_whose_folders_have_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """In `report.py a/out b/out` each run has its own column, under its own name."""
    layers = [random_layer(6, 6, 5)]
    runs = [make_run(tmp_path / name, {0: layers, 10: layers}) for name in ("a/out", "b/out", "c/b/out", "other")]
    for number, run in enumerate(runs):
        lines = [json.dumps({"step": step, "val_loss": number + step / 100}) for step in (0, 10)]
        (run / "metrics.jsonl").write_text("\n".join(lines))
    assert call(report.main, *runs, runs[0], "--output", tmp_path / "all.html").code == 0
    page = (tmp_path / "all.html").read_text()
    table = page[page.index("Validation losses as a table") :].partition("</table>")[0]
    assert re.findall("<th scope=row>([0-9]+)", table) == ["0", "10"]
    losses = [float(text) for text in re.findall("<td>([0-9.]+)</td>", table)]
    assert losses == [0, 1, 2, 3, 0, 0.1, 1.1, 2.1, 3.1, 0.1]
    names = re.findall("<th scope=col>([^<]+)</th>", table)[1:]
    assert names[0] == names[4] and len(set(names)) == len(runs)
    assert names[3] == "other" and all(str(run).endswith(name) for run, name in zip(runs, names[:4], strict=True))
    legend = page[page.index('class="run0"') :].partition("pale:")[0]
    assert all(name in legend for name in names)


def test_every_kind_of_run_has_a_report(tmp_path: Path) -> None:
    mlp = make_run(tmp_path / "mlp", {0: [], 10: []}, ffn="mlp")
    (mlp / "run.json").unlink()
    for path in (mlp / "samples").iterdir():
        path.unlink()
    with open(mlp / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "train_lo')  # half a line, which a run is writing
    assert call(report.main, mlp).code == 0
    page = (mlp / "report.html").read_text()
    assert "splines-title" not in page and "samples-title" not in page and "10 steps" in page
    (mlp / "metrics.jsonl").unlink()
    assert call(report.main, mlp).code == 0


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert_one_sentence(call(report.main, tmp_path), str(tmp_path), "config.toml")
    assert_one_sentence(call(report.main), "out_dirs is missing")
    run = make_run(tmp_path / "run", {5: [random_layer(3, 3, 4)]})
    next(run.glob("splines/*/splines.npz")).write_bytes(b"")
    assert_one_sentence(call(report.main, run), "splines.npz", "damaged")


def test_the_commands_on_the_page_make_the_same_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "it's a run", {5: []}, ffn="mlp", learning_rate=2e-3, qk_norm=False, compile=True)
    import shlex

    for about, text in read_run(run).commands():
        words = shlex.split(text)
        if words[1] == "train.py" and "again" in words[-1]:
            config, _ = parse(words[2:])
            assert config.out_dir == f"{run}-again", about
            want = read_run(run).config
            assert {**vars(config), "out_dir": ""} == {**vars(want), "out_dir": ""}


def test_a_live_report_is_written_at_every_checkpoint_and_follows(tmp_path: Path) -> None:
    seen = []
    original = train.write_report

    def watched(directories: list[Path], live: bool = False) -> Path:
        path = original(directories, live=live)
        seen.append((live, '"live":true' in path.read_text(), len(SplineRecords(directories[0]).steps())))
        return path

    arguments = options(make_dataset(tmp_path / "words"), tmp_path / "run", splines=True, report="live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", watched)
        assert call(train.main, *arguments).code == 0
    assert seen == [(True, True, 2), (True, True, 3), (False, False, 4), (False, False, 4)]


def test_a_bad_grid_is_warned_about_while_training(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "words")
    result = call(train.main, *options(dataset, tmp_path / "narrow", splines=True, spline_width=0.5))
    warnings = [line for line in result.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and re.search(r"\d\d % of the activations of layer 0 lie outside the grid", warnings[0])
    width = re.search(r"--spline-width (\d+)$", warnings[0])
    assert width
    mended = call(train.main, *options(dataset, tmp_path / "wide", splines=True, spline_width=float(width[1])))
    assert "outside the grid" not in mended.out


def test_long_curves_are_thinned_but_keep_their_evaluations() -> None:
    lines = [{"step": k, "val_loss": 1.0 if k % 1000 == 1 else None} for k in range(10_000)]
    kept = thinned(lines)
    assert len(kept) <= 2015 and kept[0] is lines[0] and kept[-1] is lines[-1]
    assert sum(line["val_loss"] is not None for line in kept) == 10
