"""What several processes gain: `python bench/scaling.py` measures two here, with `--estimate True` it calculates GPUs.

Measured are tokens per second of `train.py` with one process of one thread and with two, in turns: the same run, with
the same global batch. The estimate is arithmetic on data sheets and assumptions, all printed; none of it is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this runs as a plain script

import common.threads  # noqa: F401  before torch

import torch

from bench.shared.machine import machine_name
from bench.shared.victim import Victim
from common.command_line import OptionParser, PathText
from common.errors import UserError, exit_on_user_error
from corpus.dataset import Dataset, ensure_prepared
from model import GPT, GPTConfig
from training.config import parse

USAGE = "python bench/scaling.py [--key value …]"
ROOT = Path(__file__).resolve().parents[1]
# Per H100 SXM: dense bfloat16 peak and NVLink of one direction; a network card of 400 Gbit/s for each GPU of eight.
PEAK_FLOPS, NVLINK, NETWORK = 989e12, 450e9, 8 * 50e9
SLOW_NETWORK = 100e9 / 8  # one card of 100 Gbit/s for all eight GPUs
ASSUMED_MFU, ASSUMED_EFFICIENCY = 0.4, 0.8  # of the peaks above, what training and collectives reach
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Options:
    estimate: bool = False
    """Print the calculated share of communication on GPUs, and measure nothing."""
    config: PathText = "configs/shakespeare_char_cpu.toml"
    """The recipe to measure."""
    accumulation: int = 2
    """gradient_accumulation_steps: passes of a step, which the processes share."""
    processes: int = 2
    """How many processes, of one thread each, are compared with one."""
    steps: int = 200
    """Steps of each run."""
    repeats: int = 3
    """Rounds in which each runs once."""

    def __post_init__(self) -> None:
        if min(self.repeats, self.accumulation) < 1 or self.processes < 2 or self.steps < 100 or self.steps % 50:
            raise ValueError(
                "repeats and accumulation must be at least 1, processes 2, steps a multiple of 50 above 50"
            )


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    if options.estimate:
        estimate()
    else:
        measure(options)


def measure(options: Options) -> None:
    dataset = parse([options.config])[0].dataset
    Dataset.open(ensure_prepared(dataset))
    print(f"{machine_name('cpu')}, torch {torch.__version__}, {options.config}, one thread a process", flush=True)
    rates: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(options.repeats):
        for processes, found in rates.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(tokens_per_second(options, processes, Path(folder)))
            print(f"  {processes} x 1: {found[-1]:,.0f} tokens/s", flush=True)
    one, several = (statistics.median(found) for found in rates.values())
    print(f"median: {one:,.0f} and {several:,.0f} tokens/s, {several / one:.2f} times as many with {options.processes}")


def tokens_per_second(options: Options, processes: int, folder: Path) -> float:
    """The median over a run's log intervals but the first, which holds the start."""
    arguments = [
        options.config,
        f"--out_dir={folder / 'run'}",
        f"--max_iters={options.steps}",
        f"--gradient_accumulation_steps={options.accumulation}",
        f"--eval_interval={options.steps}",
        "--eval_iters=1",
        "--log_interval=50",
        "--num_threads=1",
        "--compile=False",
        "--device=cpu",
        "--splines=False",
        "--report=off",
        "--sample_tokens=0",
    ]
    with Victim(arguments, folder / "log", processes) as run:
        if any(run.wait(3600)):
            raise UserError(f"a run did not end well: {run.said()[-500:]}")
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["tokens_per_second"] for line in lines][1:])


@dataclass(frozen=True)
class Recipe:
    """A model, and the tokens that one GPU takes in one pass."""

    name: str
    parameters: int
    flops_per_token: float
    tokens: int

    def compute_s(self) -> float:
        return self.flops_per_token * self.tokens / (ASSUMED_MFU * PEAK_FLOPS)


def estimate() -> None:
    print(
        f"""ESTIMATE, not measured: what share of a step is communication, if none is hidden behind computing, and in
brackets what is left of it if as much as possible is hidden (DDP: behind the last backward pass, FSDP2: behind all).
Assumed: H100 SXM, of whose {PEAK_FLOPS / 1e12:.0f} TFLOP/s {ASSUMED_MFU:.0%} are reached; NVLink of \
{NVLINK / 1e9:.0f} GB/s, a network of {NETWORK / 1e9:.0f} GB/s
(slow: {SLOW_NETWORK / 1e9:.1f}) for each {GPUS_PER_MACHINE} GPUs, of which {ASSUMED_EFFICIENCY:.0%} are reached; \
ring algorithms; gradients travel in float32."""
    )
    large = GPTConfig(n_layer=24, n_head=16, n_embd=2048, block_size=2048, vocab_size=50304, num_control_points=8)
    small = parse([str(ROOT / "configs/gpt2_124m.toml")])[0]
    recipes = [recipe("gpt2_124m", small.model_config(50257), 12), recipe("24 layers of width 2048", large, 4)]
    print(f"{'model':33} {'passes/step':>11} {'how':5} {'8 GPUs':>15} {'64 GPUs':>15} {'64, slow':>15}")
    for entry in recipes:
        for passes in (1, 5):
            for how in ("DDP", "FSDP2"):
                shares = [share(entry, passes, how, gpus, slow) for gpus, slow in ((8, False), (64, False), (64, True))]
                cells = " ".join(f"{f'{worst:.1%} ({best:.1%})':>15}" for worst, best in shares)
                print(f"{f'{entry.name}, {entry.parameters / 1e9:.2f} B':33} {passes:>11} {how:5} {cells}")


def recipe(name: str, config: GPTConfig, batch_size: int) -> Recipe:
    with torch.device("meta"):
        model = GPT(config)
    # Triton's kernels multiply a spline's zeros too, so a GPU has the work of the MLP of as many parameters.
    flops = 6.0 * sum(parameter.numel() for parameter in model.parameters())
    return Recipe(name, model.num_parameters(), flops, batch_size * config.block_size)


def share(recipe: Recipe, passes: int, how: str, gpus: int, slow: bool) -> tuple[float, float]:
    """Of communication in a step, with nothing hidden and with as much hidden as fits."""
    bandwidth = ASSUMED_EFFICIENCY * (NVLINK if gpus <= GPUS_PER_MACHINE else SLOW_NETWORK if slow else NETWORK)
    ring = (gpus - 1) / gpus
    gradients = 2 * 4 * recipe.parameters * ring  # all-reduce in float32: reduce-scatter and all-gather
    if how == "FSDP2":  # reduce-scatter in float32 once, all-gather in bfloat16 before each forward and backward
        gradients = (4 + passes * 2 * 2) * recipe.parameters * ring
    communicating, computing = gradients / bandwidth, passes * recipe.compute_s()
    # DDP's all-reduce runs beside the last backward pass only, FSDP2's gathers beside all of computing.
    hidden = computing if how == "FSDP2" else recipe.compute_s() * 2 / 3
    left = max(0.0, communicating - hidden)
    return communicating / (communicating + computing), left / (left + computing)


if __name__ == "__main__":
    main()
