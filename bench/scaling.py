"""Compare the speed of one training process and of several: `python bench/scaling.py`.

The script trains the same run, with the same global batch, by one process of one thread and by two, in turns. It
compares tokens per second. With `--estimate True` it measures nothing. Then it calculates the speed of GPUs from data
sheets and assumptions, which it prints.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

from bench.shared.machine import machine_name
from bench.shared.train_processes import TrainProcesses
from common.command_line import OptionParser, PathText
from common.errors import UserError, exit_on_user_error
from corpus.dataset import Dataset, ensure_prepared
from model import GPT, GPTConfig
from training.config import parse

USAGE = "python bench/scaling.py [--key value …]"
ROOT = Path(__file__).resolve().parents[1]
# Per H100 SXM: dense bfloat16 peak, NVLink in one direction, and a network card of 400 Gbit/s for each of eight GPUs.
PEAK_FLOPS, NVLINK, NETWORK = 989e12, 450e9, 8 * 50e9
SLOW_NETWORK = 100e9 / 8  # one card of 100 Gbit/s for all eight GPUs
ASSUMED_MFU, ASSUMED_EFFICIENCY = 0.4, 0.8  # the shares of these peaks that training and collectives reach
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Options:
    estimate: bool = False
    """Print the calculated share of communication on GPUs, and measure nothing."""
    config: PathText = "configs/shakespeare_char_cpu.toml"
    """The recipe to measure."""
    accumulation: int = 2
    """Micro-batches per step (gradient_accumulation_steps), which the processes share."""
    processes: int = 2
    """Number of processes, of one thread each, to compare with a single one."""
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
    """Train, and return the median over the log intervals except the first, which includes the start."""
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
    with TrainProcesses(arguments, folder / "log", processes) as run:
        if any(run.wait(3600)):
            raise UserError(f"a run failed: {run.said()[-500:]}")
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["tokens_per_second"] for line in lines][1:])


@dataclass(frozen=True)
class Recipe:
    """A model, and the number of tokens that one GPU processes in one pass."""

    name: str
    parameters: int
    flops_per_token: float
    tokens: int

    def compute_s(self) -> float:
        return self.flops_per_token * self.tokens / (ASSUMED_MFU * PEAK_FLOPS)


def estimate() -> None:
    print(
        f"""ESTIMATE, not measured: the share of communication in a step if nothing is hidden behind computing, and in
brackets if as much as possible is hidden (DDP: behind the last backward pass, FSDP2: behind all computing).
Assumptions: H100 SXM that reaches {ASSUMED_MFU:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s; NVLink of \
{NVLINK / 1e9:.0f} GB/s and a network of {NETWORK / 1e9:.0f} GB/s per GPU
(slow: {SLOW_NETWORK / 1e9:.1f}), of which {ASSUMED_EFFICIENCY:.0%} are reached; {GPUS_PER_MACHINE} GPUs per machine; \
ring algorithms; gradients are sent in float32."""
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
    """The share of communication in a step: with nothing hidden behind computing, and with as much as fits."""
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
