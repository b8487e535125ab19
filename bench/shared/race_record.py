"""The record of a race: a JSON file, to which a later call can add seeds and contestants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.shared import nanogpt
from bench.shared.race import Curve, Options, Race, Summary
from common.errors import UserError
from common.files import write_atomically

Trials = list[tuple[Options, list[Curve]]]
Where = dict[str, str | int]


@dataclass
class Results:
    """What a race has found."""

    tuned: dict[str, Options] = field(default_factory=dict)
    """The options that each contestant trains with, besides its own."""
    trials: Trials = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def has(self, contestant: str, seed: int) -> bool:
        return any(curve.contestant == contestant and curve.seed == seed for curve in self.curves)

    def add(self, path: Path, race: Race, more: Options, where: Where) -> None:
        """Add what the file says of the race's contestants, and of nanoGPT. Raises UserError if it is of another race.

        `more` and `where`: the options that a call adds to the race's own, and what `write_record` notes besides.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            same = is_same_race(record, race, more, where)
            known = {*race.contestants, nanogpt.NAME}
            tuned = {name: options for name, options in record["tuned"].items() if name in known}
            trials = [(trial["options"], [Curve(**curve) for curve in trial["curves"]]) for trial in record["trials"]]
            curves = [Curve(**curve) for curve in record["curves"] if curve["contestant"] in known]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); --records takes files of --output") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the record of a race; --records takes files of --output") from error
        if not same or any(self.tuned.get(name, options) != options for name, options in tuned.items()):
            raise UserError(
                f"{path} differs from this call, or from the other --records, in the race, its options, the machine or "
                f"what is equal; leave it out"
            )
        self.tuned |= tuned
        self.trials += trials
        self.curves += [curve for curve in curves if not self.has(curve.contestant, curve.seed)]

    def in_order(self, race: Race) -> list[Curve]:
        """The curves by seed, and in the order of the contestants."""
        names = dict.fromkeys([*race.contestants, *(curve.contestant for curve in self.curves)])  # nanoGPT's comes last
        order = {name: k for k, name in enumerate(names)}
        return sorted(self.curves, key=lambda curve: (curve.seed, order[curve.contestant]))


def is_same_race(record: dict[str, Any], race: Race, more: Options, where: Where) -> bool:
    """Whether results of the record and of this call may stand side by side."""
    theirs, ours, equal_time = record["race"], asdict(race), where["equal"] == "time"
    shared = theirs["contestants"].keys() & ours["contestants"].keys()
    given = {name: value for name, value in more.items() if not (equal_time and name == "max_iters")}
    return (
        all(record[name] == value for name, value in where.items())
        and all(theirs[name] == ours[name] for name in ("name", "config", "common", "search", "tune_seed"))
        and all(theirs["contestants"][name] == ours["contestants"][name] for name in shared)
        and all(record["tuned"][name].get(option) == given[option] for name in shared for option in given)
        # In equal time, the first contestant's time is what all have.
        and (not equal_time or next(iter(theirs["contestants"])) == next(iter(ours["contestants"])))
    )


def write_record(path: Path, race: Race, results: Results, summaries: Sequence[Summary], where: Where) -> None:
    """Write a record; `where` names the machine, torch, the threads, and what was equal."""
    record: dict[str, Any] = {
        **where,
        "race": asdict(race),
        "tuned": results.tuned,
        "trials": [{"options": trial, "curves": [asdict(c) for c in tried]} for trial, tried in results.trials],
        "summaries": [asdict(summary) for summary in summaries],
        "curves": [asdict(curve) for curve in results.in_order(race)],
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))
