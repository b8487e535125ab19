"""Results: what was measured of one contestant in one case, as a record and as a row of the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bench.case import Case, Work
from bench.machine import Peaks
from bench.timing import Median

HEADER = (
    f"  {'':37} {'':11} {'':13} {'':13} {'MLP / it':>13} {'useful work, of peak (f+b)':>30}\n"
    f"  {'contestant':37} {'parameters':>11} {'forward':>13} {'fwd+bwd':>13} {'fwd':>6} {'f+b':>6} "
    f"{'GFLOP/s':>15} {'GB/s':>14}"
)


@dataclass(frozen=True)
class Measurement:
    """One pass of one contestant: its time, and how that compares with the MLP's and with the machine's peaks."""

    ms: float
    rounds: int
    mlp_over_it: float
    gflops: float
    gbps: float
    of_peak_gflops: float
    of_peak_gbps: float
    limit_ms: float
    """The time that the useful work takes at the peak of arithmetic or of memory, whichever is longer."""

    @classmethod
    def of(cls, time: Median, mlp: Median, work: Work, dtype: str, peaks: Peaks) -> Measurement:
        gflops, gbps = work.flops / time.ms / 1e6, work.bytes / time.ms / 1e6
        shares = gflops / peaks.usable_gflops(dtype), gbps / peaks.gbps
        return cls(time.ms, time.rounds, mlp.ms / time.ms, gflops, gbps, *shares, peaks.limit_ms(work, dtype))


@dataclass(frozen=True)
class Result:
    case: Case
    contestant: str
    parameters: int
    forward: Measurement
    training: Measurement
    """Forward and backward."""

    def record(self) -> dict[str, object]:
        record = asdict(self)
        return {**record.pop("case"), **record}

    def row(self, rounds: int) -> str:
        """A line of the table; `rounds` is what others got."""
        forward, training = self.forward, self.training
        arithmetic = f"{training.gflops:>8.1f} {training.of_peak_gflops:>6.1%}"
        memory = f"{training.gbps:>7.2f} {training.of_peak_gbps:>6.1%}"
        aside = f"  median of {training.rounds}" if training.rounds < rounds else ""
        return (
            f"  {self.contestant:37} {self.parameters:>11,} {forward.ms:>10.2f} ms {training.ms:>10.2f} ms "
            f"{forward.mlp_over_it:>6.2f} {training.mlp_over_it:>6.2f} {arithmetic} {memory}{aside}"
        )
