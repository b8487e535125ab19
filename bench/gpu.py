"""All that is to be known of a GPU, in one command: `python bench/gpu.py --minutes 20`.

Its steps run in order, each a process of its own with a time limit, and the record is rewritten after each of them: one
that crashes or hangs costs that step alone. `--plan True` prints them. No network is needed. Without a GPU,
`--rehearse True` goes through all of them on the CPU with tiny sizes; its times mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this runs as a plain script

import common.threads  # noqa: E402, F401  before torch

if missing := [name for name in ("torch", "numpy", "matplotlib", "tyro") if find_spec(name) is None]:
    sys.exit(f"error: {', '.join(missing)} must be installed first; pip install {' '.join(missing)}")

from bench.shared.gpu_plan import RECORD_FILE, STEPS, Step, limits, named  # noqa: E402
from common.command_line import OptionParser, PathText  # noqa: E402
from common.errors import UserError, exit_on_user_error  # noqa: E402
from common.files import write_atomically  # noqa: E402

USAGE = "python bench/gpu.py [--key value …]"
LAST_LINES = 25  # of what a step that failed has printed, for the record
PATIENCE_S = 10.0  # between asking a step to end and killing it


@dataclass(frozen=True)
class Options:
    minutes: float = 20.0
    """Time for all steps together; those that no longer fit are skipped."""
    only: str = ""
    """One step to run, or several, comma-separated; the record keeps what it has of the others."""
    plan: bool = False
    """Print the steps and their time limits, and run none."""
    rehearse: bool = False
    """Go through all steps on the CPU, with tiny sizes and Triton's interpreter."""
    page: bool = False
    """Write the section of docs/gpu.md that is made from the record, and run nothing."""
    table: bool = False
    """Print backends/cuda_choice.json anew, with what the record has measured, and run nothing."""
    output: PathText = "runs/gpu"
    """Folder of the record, gpu.json, of each step's output and of its training runs."""
    record: PathText = ""
    """For page and table: the record to read. By default docs/results/gpu.json, where records are published."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be a number above 0; got {self.minutes}")
        if self.plan + self.page + self.table > 1:
            raise ValueError("plan, page and table each do something of their own; give one of them")
        for name in self.chosen():
            named(name)

    def chosen(self) -> list[str]:
        return list(dict.fromkeys(part.strip() for part in self.only.split(",") if part.strip()))

    def steps(self) -> list[Step]:
        return [step for step in STEPS if not self.only or step.name in self.chosen()]


@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE).parse(sys.argv[1:])
    if options.plan:
        print_plan(options)
    elif options.page or options.table:
        from bench.shared import gpu_page  # PyTorch comes with it, and the steps' own processes need the time

        record = gpu_page.published(Path(options.record) if options.record else None)
        if options.table:
            print(gpu_page.table_text(record), end="")
        else:
            print(f"written: {gpu_page.write(record)}")
    else:
        sys.exit(Session(options).run())


def print_plan(options: Options) -> None:
    steps = options.steps()
    for step, limit in zip(steps, limits(steps, 60 * options.minutes), strict=True):
        print(f"{step.name:<12}{limit:>6.0f} s  {step.what}")


class Session:
    """The steps of one call, and the record, which has them and those of earlier calls."""

    def __init__(self, options: Options) -> None:
        self.options, self.folder = options, Path(options.output).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / RECORD_FILE
        self.record: dict[str, Any] = {"rehearsal": options.rehearse, "complete": False, "steps": {}}
        if options.only and self.path.is_file():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier["rehearsal"] is not options.rehearse:
                raise UserError(f"{self.path} is of {'no ' * options.rehearse}rehearsal; use another --output")
            self.record = earlier
        elif self.path.is_file():
            self.path.replace(self.path.with_suffix(".json.old"))

    def run(self) -> int:
        """Exit status: 0 if every step was done or had no time left, 1 if one failed or hung."""
        deadline = time.monotonic() + 60 * self.options.minutes
        steps = self.options.steps()
        for number, step in enumerate(steps):
            left = max(0.0, deadline - time.monotonic())
            limit = limits(steps[number:], left)[0]
            print(f"{step.name:<12}{step.what}", flush=True)
            outcome = self.run_step(step, limit)
            self.record["steps"][step.name] = outcome
            self.record["complete"] = all(
                self.record["steps"].get(each.name, {}).get("status") == "done" for each in STEPS
            )
            self.keep()
            print(f"{'':<12}{outcome['status']} in {outcome['seconds']:.0f} s{said(outcome)}", flush=True)
            if step.needed and outcome["status"] != "done":
                print(f"the other steps need {step.name}; mend that first", flush=True)
                return 1
        bad = [step.name for step in steps if self.record["steps"][step.name]["status"] in ("failed", "timed out")]
        print(f"record: {self.path}" + (f"; not done: {', '.join(bad)}" if bad else ""))
        return int(bool(bad))

    def keep(self) -> None:
        text = json.dumps(self.record, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def run_step(self, step: Step, limit: float) -> dict[str, Any]:
        """Status, seconds, limit and result of one step; if it was not done, why, and what it printed last."""
        if limit < step.least and not self.options.rehearse:
            why = f"{limit:.0f} s are left for it, and it needs {step.least}"
            return {"status": "skipped", "seconds": 0.0, "limit": round(limit), "why": why, "result": {}}
        result_file, log = self.folder / f"{step.name}.json", self.folder / f"{step.name}.log"
        result_file.unlink(missing_ok=True)
        arguments = [step.name, str(self.folder), f"{limit:.1f}", str(int(self.options.rehearse))]
        command = [sys.executable, "-m", "bench.shared.gpu_steps", *arguments]
        start = time.monotonic()
        with log.open("w") as output:
            code = supervise(command, limit, output, environment(step, self.options.rehearse))
        seconds = round(time.monotonic() - start, 1)
        result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.is_file() else {}
        outcome = {"seconds": seconds, "limit": round(limit), "result": result}
        if code == 0:
            return {"status": "done", **outcome}
        last = last_lines(log, {str(self.folder): "OUTPUT", str(ROOT): "."})
        why = f"not done within {limit:.0f} s" if code is None else last[-1] if last else f"it ended with status {code}"
        return {"status": "timed out" if code is None else "failed", **outcome, "why": why, "last_lines": last}


def environment(step: Step, rehearse: bool) -> dict[str, str]:
    if not rehearse:
        return dict(os.environ)
    more = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more, **({"TRITON_INTERPRET": "1"} if step.interpreted else {})}


def supervise(command: list[str], limit: float, output: Any, env: dict[str, str]) -> int | None:
    """Run a command and all that it starts; its exit status, or None if the time was up and it was ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # after Ctrl-C too
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)


def last_lines(log: Path, replaced: dict[str, str]) -> list[str]:
    """The end of a log that is not empty lines, without the paths of this machine."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for path, name in replaced.items():
        text = text.replace(path, name)
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]


def said(outcome: dict[str, Any]) -> str:
    """What there is to say beside the status."""
    words = outcome["result"].get("summary", "") if outcome["status"] == "done" else outcome["why"]
    return f": {words}" if words else ""


if __name__ == "__main__":
    main()
