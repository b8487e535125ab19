"""Time the spline layer beside the MLP of equal parameters and the KAN layers of others: `python bench/layer.py`.

All contestants take turns in one process, so that a machine that slows down slows all of them. Their medians are
compared with each other, and with the peaks of arithmetic and memory that are measured on this machine. `--device cuda`
has defaults for a GPU, and also measures the memory that training needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone, before this folder

import common.threads  # noqa: F401  before torch

import torch

import backends
from bench.shared.case import DTYPES, Case
from bench.shared.contestants import Contestant, line_up, require_rivals
from bench.shared.layer_plot import HOW_TO_READ, draw_times, panels
from bench.shared.machine import Peaks, cpu_name, gpu_record, machine_name, measure_peaks
from bench.shared.output_files import check_output_files
from bench.shared.peers import load_peers
from bench.shared.result import Measurement, Result, header
from bench.shared.timing import Passes, take_turns
from common.command_line import OptionParser, PathText
from common.errors import exit_on_user_error
from common.files import write_atomically
from common.memory import keep_freed_memory
from pictures.run_pictures import save_picture

USAGE = "python bench/layer.py [--key value …]"
MAX_SIZE = 2**31 - 1  # of any dimension
DEFAULT = "default"  # stands for the value that DEFAULTS has for the device
DEFAULTS: dict[str, dict[str, str | bool]] = {
    "cpu": {
        "tokens": "768,4096",
        "widths": "128,384",
        "grids": "5,8,16,32,64",
        "dtypes": "float32",
        "impls": "native,dense,embedding_bag,csr",
        "compiled": False,
    },
    "cuda": {
        "tokens": "65536",
        "widths": "768",
        "grids": "5,8",
        "dtypes": "bfloat16",
        "impls": "triton,chunked,semi_structured,dense,csr",
        "compiled": True,
    },
}


@dataclass(frozen=True)
class Options:
    tokens: str = DEFAULT
    """Tokens N of each case, comma-separated; as many as there are widths. By default 768,4096; with cuda 65536."""
    widths: str = DEFAULT
    """Width I = O of each case, comma-separated. By default 128,384; with cuda 768."""
    grids: str = DEFAULT
    """Control points G, comma-separated; the MLP has G·width/2 hidden units, hence equal parameters. By default
    5,8,16,32,64; with cuda 5,8."""
    dtypes: str = DEFAULT
    """float32, bfloat16 or both, comma-separated; bfloat16 is autocast around float32 weights, as in training. By
    default float32; with cuda bfloat16."""
    impls: str = DEFAULT
    """Backends to time, comma-separated, or all. Those that cannot run here are skipped. By default
    native,dense,embedding_bag,csr; with cuda triton,chunked,semi_structured,dense,csr."""
    peers: str = "kanditioned"
    """Other projects' layers to time, comma-separated NAME=PATH of a checkout; a name alone means the installed one."""
    compiled: Literal["default"] | bool = "default"
    """Also time each contestant compiled. By default False; with cuda True."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 9
    """Rounds in which each contestant runs once; the median is reported. Slow contestants run in three only."""
    output: PathText = ""
    """A JSON file for the results."""
    plot: PathText = ""
    """A picture of the times (.png, .pdf or .svg)."""

    def __post_init__(self) -> None:
        for name, default in DEFAULTS.get(self.device, {}).items():
            if getattr(self, name) == DEFAULT:
                object.__setattr__(self, name, default)
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be cpu, or cuda where there is a GPU; got {self.device!r}")
        if self.repeats < 1 or not 1 <= self.threads <= 1024:
            raise ValueError("repeats must be at least 1, and threads from 1 to 1024")
        for impl in self.impl_list():
            if impl not in backends.IMPLS:
                raise ValueError(f"impls must be all, or some of {', '.join(backends.IMPLS)}; got {impl!r}")
        check_output_files(self.output, self.plot)
        cases = self.cases()
        if self.plot and not panels(cases):
            raise ValueError("a plot needs two grids, or one width with two numbers of tokens")

    def cases(self) -> list[Case]:
        tokens, widths = integers("tokens", self.tokens, at_least=1), integers("widths", self.widths, at_least=1)
        grids = integers("grids", self.grids, at_least=2)
        if len(tokens) != len(widths):
            raise ValueError(f"tokens and widths make pairs, but there are {len(tokens)} and {len(widths)} of them")
        shapes = dict.fromkeys(zip(tokens, widths, strict=True))
        dtypes = self.dtype_list()
        return [Case(n, width, grid, dtype) for dtype in dtypes for n, width in shapes for grid in dict.fromkeys(grids)]

    def dtype_list(self) -> list[str]:
        dtypes = words(self.dtypes)
        if not dtypes or set(dtypes) - set(DTYPES):
            raise ValueError(f"dtypes must be some of {', '.join(DTYPES)}; got {self.dtypes!r}")
        return dtypes

    def impl_list(self) -> list[str]:
        return list(backends.BACKENDS) if self.impls == "all" else words(self.impls)

    def record(self) -> dict[str, object]:
        """The options without the paths of this machine, for the record."""
        options = asdict(self)
        del options["output"], options["plot"]
        return {**options, "peers": ",".join(part.partition("=")[0] for part in words(self.peers))}


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    peers, missing = load_peers(options.peers)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training
    torch.manual_seed(0)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as train.py does
    peaks = measure_peaks(options.dtype_list(), options.device)
    skipped = Skipped()
    print(f"{machine_name(options.device)}, torch {torch.__version__}, {options.threads} threads")
    if options.device == "cuda":
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gpu_record().items() if name != "name"))
    print(f"peaks: {peaks}")
    for name, reason in missing.items():
        skipped.add(name, reason)
    print(header(options.device), flush=True)
    results = []
    for case in options.cases():
        print(case, flush=True)
        passes = Passes(case, options.device)
        contestants, unable = line_up(passes, options.impl_list(), peers, bool(options.compiled))
        for name, reason in unable.items():
            skipped.add(name, reason, case)
        timed, failed = time_case(passes, contestants, peaks, options.repeats)
        for name, reason in failed.items():
            skipped.add(name, reason, case)
        results += timed
    if options.output:
        write_record(options, peaks, results, skipped)
    if options.plot:
        where = f"{machine_name(options.device)}, {options.threads} threads"
        figure = draw_times(results, f"Medians of {options.repeats} rounds, {where}.\n{HOW_TO_READ}")
        save_picture(figure, Path(options.plot))


def time_case(
    passes: Passes, contestants: Sequence[Contestant], peaks: Peaks, repeats: int
) -> tuple[list[Result], dict[str, str]]:
    """The results, and why a contestant failed when timed beside the others (they share the memory)."""
    failed: dict[str, str] = {}
    forward, training = (
        take_turns(
            {c.name: partial(run, c.module) for c in contestants if c.name not in failed},
            repeats,
            passes.device,
            failed,
        )
        for run in (passes.forward, passes.training)
    )
    require_rivals(failed, passes.case)
    results = []
    for contestant in contestants:
        name, case = contestant.name, passes.case
        if name in failed:
            continue
        passed = [
            Measurement.of(times[name], times[contestant.rival], contestant.work(case, is_training), case.dtype, peaks)
            for times, is_training in ((forward, False), (training, True))
        ]
        results.append(
            Result(case, name, contestant.parameters, passed[0], passed[1], contestant.memory, contestant.note)
        )
        print(results[-1].row(repeats), flush=True)
    return results, failed


class Skipped:
    """Collects what is not timed and why. Prints each reason once."""

    def __init__(self) -> None:
        self.records: list[dict[str, object]] = []
        self._said: set[tuple[str, str]] = set()

    def add(self, name: str, reason: str, case: Case | None = None) -> None:
        """Note that contestant `name` is skipped in `case`, or in all cases if that is None."""
        self.records.append({**(asdict(case) if case else {}), "contestant": name, "reason": reason})
        if (name, reason) not in self._said:
            print(f"  {name} skipped: {reason}")
        self._said.add((name, reason))


def write_record(options: Options, peaks: Peaks, results: Sequence[Result], skipped: Skipped) -> None:
    record = {
        "machine": machine_name(options.device),
        "cpu": cpu_name(),
        "gpu": gpu_record() if options.device == "cuda" else None,
        "torch": torch.__version__,
        "threads": options.threads,
        "peaks": asdict(peaks),
        "options": options.record(),
        "skipped": skipped.records,
        "results": [result.record() for result in results],
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(Path(options.output), lambda path: path.write_text(text + "\n"))


def words(text: str) -> list[str]:
    """The comma-separated parts of `text`, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def integers(name: str, text: str, at_least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers like 5,8,16; got {text!r}") from None
    if min(numbers) < at_least or max(numbers) > MAX_SIZE:
        raise ValueError(f"{name} must be from {at_least} to {MAX_SIZE:,}; got {text!r}")
    return numbers


if __name__ == "__main__":
    main()
