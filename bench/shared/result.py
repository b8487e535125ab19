"""The measured result of one contestant in one case, as a record and as a row of the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bench.shared.case import Case, Work
from bench.shared.machine import Peaks
from bench.shared.timing import Median

NAME_WIDTH = 48  # characters


def header(device: str) -> str:
    """The two lines above the rows. The table has columns for memory and queued runs only where those are measured."""
    more = (
        (f"{'memory':>14}{'queued (f+b)':>15}{'MLP / it':>10}", f"{'(f+b)':>14}{'':25}")
        if device == "cuda"
        else ("", "")
    )
    return (
        f"  {'':{NAME_WIDTH}} {'':11} {'':13} {'':13} {'MLP / it':>13} {'useful work, of peak (f+b)':>32}{more[0]}\n"
        f"  {'contestant':{NAME_WIDTH}} {'parameters':>11} {'forward':>13} {'fwd+bwd':>13} {'fwd':>6} {'f+b':>6} "
        f"{'GFLOP/s':>17} {'GB/s':>14}{more[1]}"
    )


@dataclass(frozen=True)
class Measurement:
    """Time of one pass of one contestant, compared with the MLP's time and with the machine's peaks."""

    ms: float
    rounds: int
    mlp_over_it: float
    gflops: float
    gbps: float
    of_peak_gflops: float
    of_peak_gbps: float
    limit_ms: float
    """Time of the useful work at the peak of arithmetic or of memory, whichever is longer."""
    queued_ms: float | None = None
    """By the GPU's clock, of one of many runs in its queue; None if not known."""
    queued_mlp_over_it: float | None = None

    @classmethod
    def of(cls, time: Median, mlp: Median, work: Work, dtype: str, peaks: Peaks) -> Measurement:
        gflops, gbps = work.flops / time.ms / 1e6, work.bytes / time.ms / 1e6
        shares = gflops / peaks.usable_gflops(dtype), gbps / peaks.gbps
        queued = time.queued_ms, mlp.queued_ms
        ratio = queued[1] / queued[0] if queued[0] and queued[1] else None
        limit = peaks.limit_ms(work, dtype)
        return cls(time.ms, time.rounds, mlp.ms / time.ms, gflops, gbps, *shares, limit, queued[0], ratio)

    def queued_columns(self) -> str:
        ms = "-" if self.queued_ms is None else f"{self.queued_ms:.2f} ms"
        ratio = "-" if self.queued_mlp_over_it is None else f"{self.queued_mlp_over_it:.2f}"
        return f"{ms:>15}{ratio:>10}"


@dataclass(frozen=True)
class Result:
    case: Case
    contestant: str
    parameters: int
    forward: Measurement
    training: Measurement
    """Forward and backward."""
    memory: int | None
    """Peak memory of training in bytes, without parameters and input; None if not known."""
    note: str | None
    """A caveat about how it was computed."""

    def record(self) -> dict[str, object]:
        record = asdict(self)
        return {**record.pop("case"), **record}

    def row(self, rounds: int) -> str:
        """A row of the table. It names this contestant's number of rounds if that is below `rounds`."""
        forward, training = self.forward, self.training
        arithmetic = f"{training.gflops:>10,.1f} {training.of_peak_gflops:>6.1%}"
        memory = f"{training.gbps:>7.2f} {training.of_peak_gbps:>6.1%}"
        on_gpu = "" if self.memory is None else f" {self.memory / 2**20:>9,.0f} MiB{training.queued_columns()}"
        aside = f"  median of {training.rounds}" if training.rounds < rounds else ""
        aside += f"  {self.note}" if self.note else ""
        return (
            f"  {self.contestant:{NAME_WIDTH}} {self.parameters:>11,} {forward.ms:>10.2f} ms {training.ms:>10.2f} ms "
            f"{forward.mlp_over_it:>6.2f} {training.mlp_over_it:>6.2f} {arithmetic} {memory}{on_gpu}{aside}"
        )
