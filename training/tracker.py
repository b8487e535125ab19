"""Logging to Weights & Biases, if asked for. Neither its errors nor a network that hangs can stop or delay a run."""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pictures.overview import curvature_map
from splines.snapshot import Snapshot
from splines.statistics import LayerStatistics, flat
from training.config import Config

WAITING_RECORDS = 1000  # more than a run logs while the network is slow
FINISH_TIMEOUT_S = 120.0


class Tracker:
    """Logs to W&B in mode offline or online. After the first failure, or without wandb, it does nothing.

    W&B's own code runs in a thread, fed by a queue, because any call of it may hang with the network. At the end of the
    run the thread gets FINISH_TIMEOUT_S to finish.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str | None, silent: bool = False) -> None:
        """`run_id`: of the resumed run, whose curve goes on; None for a new run. `silent`: do nothing."""
        self.run_id = run_id
        self.hangs = False  # whether its thread keeps the process from ending
        self._run: Any = None
        self._tasks: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING_RECORDS)
        self._thread: threading.Thread | None = None
        if config.wandb == "disabled" or silent:
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb  # noqa: F401  here: imported by two threads at once, it may be seen half loaded
        except ImportError:
            self._give_up("it is not installed; pip install wandb")
            return
        except Exception as error:  # a broken installation
            self._give_up(f"{type(error).__name__}: {error}")
            return
        self.run_id = run_id or secrets.token_hex(4)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        self._tasks.put(lambda: self._init(config, run_dir))

    def _init(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            mode=config.wandb,
            id=self.run_id,
            resume="allow" if config.wandb == "online" else None,
            config=asdict(config),
            settings=wandb.Settings(init_timeout=30, console="off"),
        )

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:  # of its network, login or disk: none of them is worth a run
                self._give_up(f"{type(error).__name__}: {error}")
                return

    def _do(self, task: Callable[[], object]) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self.hangs = True
            self._give_up(f"it has not taken {WAITING_RECORDS} records")

    def log(self, record: dict[str, Any], step: int) -> None:
        known = {name: value for name, value in record.items() if value is not None and name != "splines"}
        self._do(lambda: self._run.log(known, step=step))

    def log_picture(self, path: Path, step: int) -> None:
        """Add a picture of the splines to `step`."""

        def log() -> None:
            import wandb

            self._run.log({"splines/overview": wandb.Image(str(path))}, step=step)

        self._do(log)

    def log_splines(self, snapshots: Sequence[Snapshot], statistics: Sequence[LayerStatistics], step: int) -> None:
        """Log each layer's statistics, as numbers and as a table, and a map of its curvature."""
        if self._thread is None:
            return
        rows = [each.as_dict() for each in statistics]
        maps = {f"splines/map_{each.layer}": curvature_map(each) for each in snapshots}

        def log() -> None:
            import wandb

            table = wandb.Table(columns=list(rows[0]), data=[[str(value) for value in row.values()] for row in rows])
            pictures = {name: wandb.Image(pixels) for name, pixels in maps.items()}
            self._run.log({**flat(statistics), **pictures, "splines/table": table}, step=step)

        self._do(log)

    def finish(self) -> None:
        """Wait until W&B has everything, at most FINISH_TIMEOUT_S."""
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():
            return
        try:
            self._tasks.put(lambda: self._run.finish(), timeout=FINISH_TIMEOUT_S)
            self._tasks.put(None, timeout=FINISH_TIMEOUT_S)
        except queue.Full:
            pass
        thread.join(FINISH_TIMEOUT_S)
        if thread.is_alive():
            self.hangs = True
            print(f"wandb: did not finish in {FINISH_TIMEOUT_S:.0f} s and is abandoned", flush=True)

    def _give_up(self, why: str) -> None:
        self._thread = None
        print(f"wandb: off from here on, training goes on ({why})", flush=True)
