"""Learning-rate schedules: warm-up, nanoGPT's cosine, warm-up-stable-decay, and a constant rate."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import Config
from training.schedule import learning_rate


@st.composite
def scheduled(draw: st.DrawFn, schedule: str) -> Config:
    peak = draw(st.floats(1e-6, 1.0))
    floor = draw(st.one_of(st.just(-1.0), st.floats(0, peak)))
    steps = draw(st.integers(2, 500))
    warmup = draw(st.integers(0, steps - 1))
    decay = draw(st.integers(0, steps - warmup))
    return Config(
        schedule=schedule,  # type: ignore[arg-type]
        learning_rate=peak,
        min_lr=floor,
        max_iters=steps,
        warmup_iters=warmup,
        decay_iters=decay,
    )


def end_of(config: Config) -> int:
    """The step at which the decay ends."""
    is_early = config.schedule == "cosine" and config.decay_iters
    return config.warmup_iters + config.decay_iters if is_early else config.max_iters


@settings(deadline=None)
@given(st.sampled_from(["cosine", "wsd", "constant"]).flatmap(scheduled))
def test_warm_up_is_linear_from_near_zero_and_no_rate_is_above_the_peak(config: Config) -> None:
    peak, warmup = config.learning_rate, config.warmup_iters
    rates = [learning_rate(step, config) for step in range(max(config.max_iters, end_of(config)) + 5)]
    assert min(rates) >= 0 and max(rates) <= peak * (1 + 1e-12)
    for step, rate in enumerate(rates[:warmup]):
        assert rate == pytest.approx(peak * (step + 1) / (warmup + 1))
    assert rates[0] <= peak / min(warmup + 1, 2) * (1 + 1e-12)


@settings(deadline=None)
@given(scheduled("cosine"))
def test_cosine_is_nanogpts_schedule(config: Config) -> None:
    peak, warmup, decay = config.learning_rate, config.warmup_iters, end_of(config)
    min_lr = peak / 10 if config.min_lr == -1 else config.min_lr

    def get_lr(it: int) -> float:  # github.com/karpathy/nanoGPT, train.py
        if it < warmup:
            return peak * (it + 1) / (warmup + 1)
        if it > decay:
            return min_lr
        decay_ratio = (it - warmup) / (decay - warmup)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return min_lr + coeff * (peak - min_lr)

    for step in range(decay + 10):
        assert learning_rate(step, config) == pytest.approx(get_lr(step), rel=1e-9, abs=1e-18)


@settings(deadline=None)
@given(scheduled("cosine"))
def test_cosine_falls_without_jumps_from_the_peak_to_its_floor(config: Config) -> None:
    peak, warmup, decay = config.learning_rate, config.warmup_iters, end_of(config)
    floor = peak / 10 if config.min_lr == -1 else config.min_lr
    rates = [learning_rate(step, config) for step in range(warmup, decay + 3)]
    assert rates[0] == pytest.approx(peak) and rates[-3:] == pytest.approx([floor] * 3)
    steepest = math.pi / 2 * (peak - floor) / (decay - warmup)  # the steepest slope of a cosine
    for before, after in pairwise(rates):
        assert -1e-12 * peak <= before - after <= steepest + 1e-12 * peak


@settings(deadline=None)
@given(scheduled("wsd"))
def test_wsd_is_constant_and_then_a_straight_line_to_its_floor(config: Config) -> None:
    peak, decay = config.learning_rate, end_of(config)
    floor = 0.0 if config.min_lr == -1 else config.min_lr
    cooldown = config.decay_iters or max(1, round(0.4 * decay))
    for step in range(config.warmup_iters, decay + 5):
        share = min(1.0, max(0, decay - step) / cooldown)
        assert learning_rate(step, config) == pytest.approx(floor + share * (peak - floor), abs=1e-18)
    assert learning_rate(decay, config) == pytest.approx(floor, abs=1e-18)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    config = Config(schedule="constant", learning_rate=0.25, warmup_iters=3, max_iters=20)
    assert [learning_rate(step, config) for step in range(3, 30)] == [0.25] * 27
