"""What is random within a step: dropout."""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of all devices for one step of one process.

    So dropout depends on these three alone, as batches do on the first two: nothing drawn between steps disturbs
    training, and a resumed run needs no generator's state, on however many processes.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
