"""Evaluation: the loss on the validation split, on the same batches every time."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from corpus.batches import Batch, evaluation_batches
from corpus.dataset import TokenStream
from training.config import Config
from training.device import Device
from training.distributed import ALONE, World

EVALUATION_TOKENS = 8192  # without gradients larger batches than in training fit, which is faster over a whole split


@torch.no_grad()
def evaluate(model: nn.Module, stream: TokenStream, config: Config, device: Device, world: World = ALONE) -> float:
    """Mean cross entropy per token, in nats; over the whole split if config.eval_iters is 0.

    Every process of `world` must call it, and evaluates every world.size-th batch. `model` should not be compiled: the
    batches have other shapes than in training, and each shape would be compiled again.
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


def check_evaluation(stream: TokenStream, config: Config) -> None:
    """Raise UserError if the split has too little text for an evaluation. To be told before training, not after."""
    evaluation_batches(stream, config.block_size, config.batch_size, config.eval_iters)


def _my_batches(batches: Iterable[Batch], world: World) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """The batches of this process, and whether each counts. Every process gets the same number of them.

    The processes of a sharded model have to go through its layers together. So a process without a batch of its own in
    the last round repeats an earlier one, which does not count.
    """
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == world.size:
            yield *waiting[world.rank], True
            waiting.clear()
    if waiting:
        yield *waiting[min(world.rank, len(waiting) - 1)], world.rank < len(waiting)
