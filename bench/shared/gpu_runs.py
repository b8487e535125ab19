"""Steps of `bench/gpu.py` that run the project's commands: short runs beside their twins, resume, sampling.

Nothing here needs PyTorch itself, which takes its time to import.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bench.shared.gpu_setting import Setting
from corpus.dataset import META_FILE, ensure_prepared, find_dataset
from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter
from training.metrics import METRICS_FILE

Options = dict[str, Any]
QUIET = {"splines": False, "report": "off", "sample_tokens": 0}
TINY = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_iters": 1,
    "max_iters": 4,
    "eval_interval": 4,
    "eval_iters": 2,
    "log_interval": 1,
    "num_threads": 1,
    "vocab_size": 0,
    "compile": False,
    "device": "cpu",
}


def dataset(setting: Setting, wanted: str = "stdlib") -> Path:
    """The prepared folder of `wanted`, or of stdlib, which any machine can prepare; in a rehearsal a few words."""
    if setting.rehearse:
        folder = setting.folder / "words"
        if not (folder / META_FILE).is_file():
            text = "the spline bends where its knots tell it to\n" * 40
            tokens = CharTokenizer.from_text(text).encode_array(text)
            with DatasetWriter(folder, CharTokenizer.from_text(text), "a rehearsal") as writer:
                writer.write("train", tokens[200:])
                writer.write("val", tokens[:200])
        return folder
    folder = find_dataset(wanted)
    return folder if (folder / META_FILE).is_file() else ensure_prepared("stdlib")


# ---- runs beside their twins -----------------------------------------------------------------------------------------


def shakespeare(setting: Setting) -> None:
    steps = {"max_iters": 1000, "eval_interval": 500, "eval_iters": 50, "log_interval": 50}
    beside_twins(setting, "shakespeare_char", "shakespeare_char", {"splines": {}, "mlp": {"ffn": "mlp"}}, steps)


def gpt2(setting: Setting) -> None:
    """For throughput: the text has another vocabulary, so the losses mean nothing."""
    steps = {"max_iters": 20, "eval_interval": 20, "eval_iters": 1, "log_interval": 4}
    runs: dict[str, Options] = {"G=8": {}, "mlp": {"ffn": "mlp"}}
    if not setting.rehearse:
        runs["G=5"] = {"num_control_points": 5}
    beside_twins(setting, "gpt2_124m", "stdlib", runs, steps)


def best(setting: Setting) -> None:
    steps = {"max_iters": 500, "eval_interval": 500, "log_interval": 50}
    beside_twins(
        setting, "shakespeare_char_best", "shakespeare_char", {"gated": {}, "swiglu": {"ffn": "swiglu"}}, steps
    )


def beside_twins(setting: Setting, config: str, text: str, runs: dict[str, Options], steps: Options) -> None:
    """Each run with its share of the time; the twin is judged by the same steps."""
    data = dataset(setting, text)
    for number, (name, changes) in enumerate(runs.items()):
        limit = (setting.left() - 3) / (len(runs) - number)
        given = {**steps, "compile": True, "device": "cuda", **(TINY if setting.rehearse else {}), **QUIET, **changes}
        row = {"run": name, "config": config, "dataset": data.name, "options": changes}
        try:
            out_dir = train(setting, f"{config}-{name}", data, limit, f"configs/{config}.toml", **given)
            row |= measured(out_dir)
        except RuntimeError as error:
            row["failed"] = str(error)
        setting.add("runs", row)
    failed = [f"{row['run']}: {row['failed']}" for row in setting.result["runs"] if "failed" in row]
    if failed:
        raise RuntimeError("; ".join(failed))
    speeds = ", ".join(f"{row['run']} {row['tokens_per_second']:,.0f}" for row in setting.result["runs"])
    setting.keep(summary="rehearsed" if setting.rehearse else f"tokens/s: {speeds}")


def train(setting: Setting, name: str, data: Path, limit: float, *arguments: str, **options: Any) -> Path:
    """Train in a process of its own; the run's folder."""
    out_dir = setting.folder / "runs" / f"{setting.step}-{name}-{time.strftime('%m%d-%H%M%S')}"
    given = {"dataset": data, "out_dir": out_dir, **options}
    setting.call("train.py", *arguments, *(f"--{key}={value}" for key, value in given.items()), limit=limit)
    return out_dir


def measured(out_dir: Path) -> dict[str, Any]:
    """From a run's metrics: its speed in the last steps that were logged, and its losses."""
    lines = [json.loads(line) for line in (out_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    last = lines[-1]
    losses = [line["val_loss"] for line in lines if line["val_loss"] is not None]
    names = ("step", "train_loss", "tokens_per_second", "step_ms", "elapsed_s")
    return {**{name: last[name] for name in names}, "best_val_loss": min(losses, default=None)}


# ---- other paths -----------------------------------------------------------------------------------------------------


def paths(setting: Setting) -> None:
    """float16 with Muon, then the same run resumed, then sampled from."""
    data, device = dataset(setting), setting.device
    narrow = "bfloat16" if setting.rehearse else "float16"  # which is for GPUs only
    small = {**TINY, "device": device, "compile": not setting.rehearse, "dtype": narrow, "optimizer": "muon", **QUIET}
    out_dir = train(setting, "muon", data, setting.left() / 2, **small)
    setting.add("paths", {"path": f"{narrow} and Muon", **measured(out_dir)})
    setting.call("train.py", "--resume=True", f"--out_dir={out_dir}", "--max_iters=8")
    setting.add("paths", {"path": "resumed", **measured(out_dir)})
    text = setting.call("sample.py", out_dir, f"--device={device}", "--max_new_tokens=20")
    setting.add("paths", {"path": "sampled", "characters": len(text)})
    resumed = setting.result["paths"][1]["step"]
    if resumed != 8 or not text:
        raise RuntimeError(f"the resumed run ended at step {resumed}, and {len(text)} characters were sampled")
    setting.keep(summary=f"{narrow} with Muon, resumed, sampled")
