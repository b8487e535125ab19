"""The learning rate as a pure function of the step."""

import math

from training.config import Config

WSD_COOLDOWN_SHARE = 0.4  # of the run, when cooldown_iters is not given


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of the step that comes after `step` finished ones (0 ≤ step < max_iters)."""
    peak = config.learning_rate
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        floor = max(config.min_lr, 0.0)
        cooldown = config.cooldown_iters or max(1, round(WSD_COOLDOWN_SHARE * end))
        remaining = min(1.0, max(0.0, (end - step) / cooldown))
        return floor + (peak - floor) * remaining
    floor = peak / 10 if config.min_lr < 0 else config.min_lr
    if step >= end:
        return floor
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))
