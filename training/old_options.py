"""Options of earlier versions: what to write instead, and how they are read in the files of old runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from common.errors import UserError

# "name", or "name=value" if only that value is gone → what to write now.
RETIRED = {
    "ffn=kan": "write --ffn splines for one spline layer, or --ffn gated_splines",
    "kan_block": "write --ffn splines for plain ones, or --ffn gated_splines",
    "ffn_match": "write the hidden size that you want as --ffn_hidden",
    "live": "write --report live",
    "report=true": "write --report end",
    "report=false": "write --report off",
    "on_nonfinite": "write --max_skipped_steps 0 to stop at the first step that is not finite, or how many to skip",
    "lr_decay_iters": "write --decay_iters, the number of steps over which the learning rate decays",
    "cooldown_iters": "write --decay_iters, the number of steps over which the learning rate decays",
    "wandb_run_name": "the run at W&B has the name of --out_dir",
    "verify_data": "data is verified when its files have changed since they were last verified",
}


def renamed(saved: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Rename the options that a run, perhaps of an earlier version, saved in `source` to those of today.

    Prints a note on standard error if any changed, once per process. UserError for values that no version has written.
    """
    try:
        new = _translated(saved)
    except (TypeError, KeyError) as error:
        raise UserError(f"{source} holds a damaged configuration: {error}") from error
    kept = {name: value for name, value in saved.items() if name not in RETIRED}
    if {**kept, **new} != saved:
        now = ", ".join(f"{name}={value}" for name, value in new.items()) or "what they are today"
        _say(f"{source} was written by an earlier version; its old options are read as {now}")
    return {**kept, **new}


def _translated(old: Mapping[str, Any]) -> dict[str, Any]:
    """The options of today that replace the retired ones in `old`."""
    new: dict[str, Any] = {}
    if old.get("ffn") == "kan":
        new["ffn"] = "gated_splines" if old.get("kan_block") == "gated" else "splines"
    if isinstance(old.get("report"), bool):
        new["report"] = "off" if not old["report"] else "live" if old.get("live") else "end"
    if old.get("on_nonfinite") == "stop":
        new["max_skipped_steps"] = 0
    if old.get("ffn_match") and not old.get("ffn_hidden"):
        new["ffn_hidden"] = matched_width({**old, **new})
    if old.get("schedule") == "wsd" and old.get("cooldown_iters"):
        new["decay_iters"] = old["cooldown_iters"]
    elif old.get("schedule", "cosine") == "cosine" and old.get("lr_decay_iters"):
        new["decay_iters"] = max(1, old["lr_decay_iters"] - old.get("warmup_iters", 0))
    return new


@cache
def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def matched_width(values: Mapping[str, Any]) -> int:
    """The hidden width that `ffn_match` gave: as many parameters as plain splines with num_control_points."""
    points = values["num_control_points"] - values.get("kan_zero_centred", False)
    matrices = {"mlp": 2, "mlp_tanh": 2, "relu2": 2, "swiglu": 3}.get(values["ffn"], points + 2)
    multiple = points - bool(values.get("attention_gate"))
    return max(1, round(multiple * values["n_embd"] / matrices))
