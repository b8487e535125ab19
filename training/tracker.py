"""Weights & Biases, when asked for. Nothing it does or fails to do can stop a run."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.config import Config


class Tracker:
    """Logs to W&B in mode offline or online; after the first failure, or without wandb, it does nothing more."""

    def __init__(self, config: Config, run_dir: Path, run_id: str | None) -> None:
        """`run_id`: that of the run being resumed, so that its curve goes on."""
        self._run: Any = None
        self.run_id = run_id
        if config.wandb == "disabled":
            return
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_run_name or run_dir.name,
                dir=str(run_dir),
                mode=config.wandb,
                id=run_id,
                resume="allow" if config.wandb == "online" else None,
                config=asdict(config),
                settings=wandb.Settings(init_timeout=30, console="off"),
            )
            self.run_id = self._run.id
        except ImportError:
            print("wandb: off, since it is not installed; pip install wandb", flush=True)
        except Exception as error:  # its network, its login, its disk: none of them is worth a run
            self._give_up(error)

    def log(self, record: dict[str, Any], step: int) -> None:
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in record.items() if value is not None}, step=step)
        except Exception as error:
            self._give_up(error)

    def log_picture(self, path: Path, step: int) -> None:
        """Add a picture of the splines to `step`; the next `log` of that step completes it."""
        if self._run is None:
            return
        try:
            import wandb

            self._run.log({"splines": wandb.Image(str(path))}, step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"wandb: off from here on, training goes on ({type(error).__name__}: {error})", flush=True)
