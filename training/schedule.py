"""The learning rate as a pure function of the step."""

import math

from training.config import Config

WSD_DECAY_SHARE = 0.4  # of the run, when decay_iters is not given


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of the step that comes after `step` finished ones (0 ≤ step < max_iters)."""
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
