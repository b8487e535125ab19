"""Batches: random ones for training, which depend on seed and step alone, and fixed ones for evaluation."""

from collections.abc import Iterator

import numpy as np
import torch

from common.errors import UserError
from corpus.dataset import TokenStream

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchSampler:
    """Draws random windows of a split, for training.

    A batch depends on the data, `seed` and the step alone. So a resumed run sees the batches of an uninterrupted one,
    whatever else draws random numbers.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """`batch_size`: sequences in a step, over all micro-batches and processes; a multiple of `world_size`.

        `UserError` if no shard is longer than `block_size`.
        """
        _check_fits(stream, block_size)
        self.stream = stream
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // world_size
        self._mine = slice(rank * share, (rank + 1) * share)
        self._windows = stream.number_of_windows(block_size + 1)

    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, each (batch_size / world_size, block_size) int64; targets are one token ahead.

        Windows are drawn uniformly, with replacement. The shares of all ranks, joined, are the batch of one process.
        """
        # Philox is a function of its key, so the numbers of any step come without drawing those of earlier steps.
        key = np.array([self.seed % (1 << 64), step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        starts = generator.integers(0, self._windows, size=self.batch_size)
        return _inputs_and_targets(self.stream.windows(starts[self._mine], self.block_size + 1))


def evaluation_batches(stream: TokenStream, block_size: int, batch_size: int, eval_iters: int) -> Iterator[Batch]:
    """Inputs and targets, (batch, length) int64, the same at every call.

    eval_iters = 0: the whole split in consecutive windows. Each token is predicted once, except for the first of each
    shard. Batches differ in size: the last one of a shard has fewer rows, and the rest of the shard follows as one row
    shorter than `block_size`. So weight each batch by its `numel()`.
    eval_iters > 0: that many batches of (batch_size, block_size) at evenly spaced starts.

    `UserError`, at the call and not at the first batch, if there is too little data.
    """
    if eval_iters < 0:
        raise UserError(f"eval_iters is {eval_iters}; use 0 for the whole split or a number of batches above 0")
    if eval_iters == 0:
        _check_fits(stream, 1)
        return _whole_split(stream, block_size, batch_size)
    _check_fits(stream, block_size)
    return _evenly_spaced(stream, block_size, batch_size, eval_iters)


def _whole_split(stream: TokenStream, block_size: int, batch_size: int) -> Iterator[Batch]:
    for shard in stream.shards:
        full, rest = divmod(max(0, len(shard) - 1), block_size)  # the first token is never predicted
        for row in range(0, full, batch_size):
            rows = min(batch_size, full - row)
            start, count = row * block_size, rows * block_size
            inputs = shard[start : start + count].reshape(rows, block_size)
            targets = shard[start + 1 : start + 1 + count].reshape(rows, block_size)
            yield torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))
        if rest:
            yield _inputs_and_targets(shard[full * block_size :][np.newaxis].astype(np.int64))


def _evenly_spaced(stream: TokenStream, block_size: int, batch_size: int, eval_iters: int) -> Iterator[Batch]:
    last = stream.number_of_windows(block_size + 1) - 1
    starts = np.linspace(0, last, eval_iters * batch_size).astype(np.int64).reshape(eval_iters, batch_size)
    for row in starts:
        yield _inputs_and_targets(stream.windows(row, block_size + 1))


def _inputs_and_targets(windows: np.ndarray) -> Batch:
    """Split (rows, length + 1) windows into inputs and targets, (rows, length) each, contiguous."""
    # Copied by numpy: a copy this small costs torch's thread pool milliseconds when the cores are busy.
    inputs, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _check_fits(stream: TokenStream, block_size: int) -> None:
    if stream.number_of_windows(block_size + 1) > 0:
        return
    longest = max((len(shard) for shard in stream.shards), default=0)
    smaller = f"use a --block_size of at most {longest - 1} or " if longest > 1 else ""
    raise UserError(
        f"block_size {block_size} needs {block_size + 1:,} successive tokens, but split {stream.split} has "
        f"only {longest:,}; {smaller}prepare more text"
    )
