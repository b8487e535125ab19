"""What is made from a record of bench/gpu.py: the section of docs/gpu.md, and the table that `auto` goes by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import backends
from backends import cuda_choice, triton
from bench import gpu
from bench.shared import gpu_page
from bench.shared.case import Case
from bench.shared.gpu_plan import STEPS
from bench.shared.result import Measurement, Result
from common.errors import UserError
from tests.runs import assert_one_sentence, call


def layer_table(grid: int, times: dict[str, float]) -> dict[str, Any]:
    """As bench/layer.py records it, with these milliseconds for forward and backward, queued; 3 ms each alone."""
    of = {name: Measurement(3.0, 9, 1.0, 1.0, 1.0, 0.5, 0.5, 0.1, ms, times["mlp"] / ms) for name, ms in times.items()}
    case = Case(65_536, 768, grid, "bfloat16")
    results = [Result(case, name, 1, measured, measured, 2**30, None).record() for name, measured in of.items()]
    card = {"name": "A card", "compute_capability": "9.0", "triton": "3.7.1"}
    return {"results": results, "gpu": card, "torch": "2.11.0"}


def record() -> dict[str, Any]:
    done = {"status": "done", "seconds": 1.0, "limit": 60}
    tables = {
        "8": layer_table(8, {"mlp": 3.0, "chunked": 1.0, "triton compiled": 2.5, "chunked compiled": 2.75}),
        "5": layer_table(5, {"mlp": 3.0, "triton": 2.0, "chunked": 1.5, "dense": 1.25}),
    }
    versions = {"gpu": {"name": "A card", "driver": "570"}, "versions": {"torch": "2.11.0", "triton": "3.7.1"}}
    run = {"run": "mlp", "config": "gpt2_124m", "dataset": "stdlib", "step": 20, "train_loss": 5.0}
    run |= {"tokens_per_second": 1e5, "step_ms": 5.0, "elapsed_s": 9.0, "best_val_loss": None}
    return {
        "rehearsal": False,
        "complete": False,
        "steps": {
            "preflight": {**done, "result": versions},
            "tests": {**done, "status": "failed", "why": "a | b", "result": {}},
            "layer": {**done, "result": {"tables": tables}},
            "gpt2": {**done, "result": {"runs": [run, {**run, "run": "G=8", "failed": "out of memory"}]}},
        },
    }


def test_the_page_says_what_the_published_record_says() -> None:
    page = gpu_page.PAGE.read_text(encoding="utf-8")
    made = gpu_page.with_section(page, gpu_page.section(gpu_page.published()))
    assert made == page, "python bench/gpu.py --page True makes it anew"
    assert ("has never run on a GPU" in page) is not gpu_page.PUBLISHED.is_file()


def test_every_step_and_figure_is_on_the_page() -> None:
    lines = gpu_page.section(record()).splitlines()
    for step in STEPS:
        assert any(line.startswith(f"| {step.name} | ") for line in lines)
    assert "| tests | failed | 1 | a \\| b |" in lines and "| peaks | not run | 0 |  |" in lines
    assert "| 8 | chunked compiled | 3.00 | 3.00 | 1.00 | 2.75 | 1.09 | 1,024 |" in lines
    assert "| gpt2_124m | mlp | stdlib | 20 | 100,000 | 5.0 | 5.000 |  |" in lines
    assert any("failed: out of memory" in line for line in lines)


def test_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    gpu_page.write(None, page)
    first = page.read_text()
    page.write_text(f"# Mine\n\nbefore\n\n{first.partition(chr(10) * 2)[2]}\n## After\n")
    gpu_page.write(record(), page)
    text = page.read_text()
    assert text.startswith("# Mine\n\nbefore\n\n" + gpu_page.BEGIN) and text.endswith("\n## After\n")
    assert "A card" in text and "has never run" not in text
    gpu_page.write(None, page)
    gpu_page.write(record(), page)
    assert page.read_text() == text


def test_a_rehearsal_makes_no_page(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**record(), "rehearsal": True}))
    with pytest.raises(UserError, match="rehearsal on a CPU"):
        gpu_page.published(path)
    assert_one_sentence(call(gpu.main, "--page=True", f"--record={path}"), "times mean nothing")


def test_auto_follows_the_printed_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(record()))
    printed = call(gpu.main, "--table=True", f"--record={path}")
    assert printed.code == 0
    table = cuda_choice.read_table(printed.out)
    assert table["any"] == cuda_choice.table()["any"], "others are as they were"
    monkeypatch.setattr(cuda_choice, "table", lambda: table)
    monkeypatch.setattr(cuda_choice, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(triton, "why_not_on", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def chosen(grid: int, tokens: int | None = None) -> tuple[str, str]:
        backend, why = backends.choose("auto", backends.Problem(768, grid, 768, torch.device("cuda"), tokens))
        return backend.name, why

    name, why = chosen(8)
    assert name == "triton" and "2.50 ms forward and backward, chunked 2.75 (A card, torch 2.11.0, Triton 3.7.1" in why
    assert chosen(6)[0] == "triton" and chosen(5)[0] == "dense" and chosen(3)[0] == "dense"
    for far in (chosen(64), chosen(8, tokens=16)):
        assert far[0] == "chunked" and "not measured" in far[1], "far from what was measured"


def test_without_measurements_there_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**record(), "steps": {}}))
    assert_one_sentence(call(gpu.main, "--table=True", f"--record={path}"), "run python bench/gpu.py first")
