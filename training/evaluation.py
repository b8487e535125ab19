"""The loss on the validation split, the same batches every time."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from corpus.batches import Batch, evaluation_batches
from corpus.dataset import TokenStream
from training.config import Config
from training.device import Device
from training.distributed import ALONE, World

EVALUATION_TOKENS = 8192  # a whole-split evaluation takes larger batches than training: no gradients to keep


@torch.no_grad()
def evaluate(model: nn.Module, stream: TokenStream, config: Config, device: Device, world: World = ALONE) -> float:
    """Mean cross entropy per token, in nats; over the whole split if config.eval_iters is 0.

    Every process of `world` must call it, and takes each world.size-th batch. Give it the uncompiled model: batches of
    other shapes than in training would be compiled anew.
    """
    was_training = model.training
    model.eval()
    rows = config.batch_size if config.eval_iters else max(config.batch_size, EVALUATION_TOKENS // config.block_size)
    total, count = 0.0, 0
    for x, y, counts in _my_batches(evaluation_batches(stream, config.block_size, rows, config.eval_iters), world):
        with device.autocast():
            _, loss = model(x.to(device.device), y.to(device.device))
        if counts:
            total += loss.item() * y.numel()
            count += y.numel()
    model.train(was_training)
    total, tokens = world.sum(total, count)
    return total / tokens


def _my_batches(batches: Iterable[Batch], world: World) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Equally many batches for every process: one that is left over in the last round sees an earlier one again, which
    does not count. For the processes of a sharded model must go through its layers together.
    """
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == world.size:
            yield *waiting[world.rank], True
            waiting.clear()
    if waiting:
        yield *waiting[min(world.rank, len(waiting) - 1)], world.rank < len(waiting)
