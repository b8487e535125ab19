"""The batches of training steps, on the device; for a GPU they are fetched while it works on the step before."""

from __future__ import annotations

import torch

from corpus.batches import Batch, BatchSampler


class BatchFeed:
    """Gives the batch of any step. For a GPU it comes from pinned memory, so that copying does not wait for the GPU."""

    def __init__(self, sampler: BatchSampler, device: torch.device, last_step: int) -> None:
        """`last_step`: the number of steps of the run, beyond which nothing is fetched."""
        self.sampler, self.device, self.last_step = sampler, device, last_step
        self.ahead = device.type == "cuda"
        self._fetched: tuple[int, Batch] | None = None

    def take(self, step: int) -> Batch:
        """x and y of `step`, both (sequences, block_size), on the device."""
        if not self.ahead:
            x, y = self.sampler.batch(step)
            return x.to(self.device), y.to(self.device)
        if self._fetched is None or self._fetched[0] != step:
            self._fetched = step, self._pinned(step)
        x, y = self._fetched[1]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def fetch(self, step: int) -> None:
        """Draw the batch of `step` now, when the GPU has work and the host has none."""
        if self.ahead and step < self.last_step:
            self._fetched = step, self._pinned(step)

    def _pinned(self, step: int) -> Batch:
        x, y = self.sampler.batch(step)
        return x.pin_memory(), y.pin_memory()
