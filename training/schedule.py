"""Functions of the step alone: the learning rate, and the seed of the random numbers drawn in it."""

import math

import numpy as np
import torch

from training.config import Config

WSD_DECAY_SHARE = 0.4  # of all steps, if decay_iters is not given


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of the step that follows `step` finished ones (0 ≤ step < max_iters)."""
    peak = config.learning_rate
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        floor = max(config.min_lr, 0.0)
        decay = config.decay_iters or max(1, round(WSD_DECAY_SHARE * config.max_iters))
        remaining = min(1.0, max(0.0, (config.max_iters - step) / decay))
        return floor + (peak - floor) * remaining
    floor = peak / 10 if config.min_lr < 0 else config.min_lr
    decay = config.decay_iters or config.max_iters - config.warmup_iters
    progress = min(1.0, (step - config.warmup_iters) / decay)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of all devices for one step of process `rank`.

    So dropout depends on the arguments alone, and nothing that draws random numbers between steps disturbs training. A
    resumed run needs no generator's state, on however many processes.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
