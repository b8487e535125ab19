"""The record of a race: a JSON file, to which a later call can add seeds and contestants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.shared.race import Curve, Options, Race, Summary
from common.errors import UserError
from common.files import write_atomically

Trials = list[tuple[Options, list[Curve]]]


@dataclass
class Results:
    """What a race has found."""

    tuned: dict[str, Options] = field(default_factory=dict)
    """The options that each contestant trains with, besides its own."""
    trials: Trials = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def has(self, contestant: str, seed: int) -> bool:
        return any(curve.contestant == contestant and curve.seed == seed for curve in self.curves)

    def add(self, path: Path, race: Race, equal: str) -> None:
        """Add what the file says of the race's contestants. Raises UserError if it is not of the same race."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            same = record["race"]["name"] == race.name and record["equal"] == equal
            tuned = {name: options for name, options in record["tuned"].items() if name in race.contestants}
            curves = [Curve(**curve) for curve in record["curves"] if curve["contestant"] in race.contestants]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); --records takes files of --output") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not the record of a race; --records takes files of --output") from error
        if not same or any(self.tuned.get(name, options) != options for name, options in tuned.items()):
            raise UserError(
                f"{path} is not of the same race, budget and options as this call and the other --records; leave it out"
            )
        self.tuned |= tuned
        self.curves += [curve for curve in curves if not self.has(curve.contestant, curve.seed)]

    def in_order(self, race: Race) -> list[Curve]:
        """The curves by seed, and in the order of the contestants."""
        names = dict.fromkeys([*race.contestants, *(curve.contestant for curve in self.curves)])  # nanoGPT's comes last
        order = {name: k for k, name in enumerate(names)}
        return sorted(self.curves, key=lambda curve: (curve.seed, order[curve.contestant]))


def write_record(
    path: Path, race: Race, results: Results, summaries: Sequence[Summary], where: dict[str, str | int]
) -> None:
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
