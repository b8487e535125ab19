"""The loss on the validation split, the same batches every time."""

import torch
from torch import nn

from training.batches import evaluation_batches
from training.config import Config
from training.dataset import TokenStream
from training.device import Device

EVALUATION_TOKENS = 8192  # a whole-split evaluation takes larger batches than training: no gradients to keep


@torch.no_grad()
def evaluate(model: nn.Module, stream: TokenStream, config: Config, device: Device) -> float:
    """Mean cross entropy per token, in nats; over the whole split if config.eval_iters is 0.

    Give it the uncompiled model: batches of other shapes than in training would be compiled anew.
    """
    was_training = model.training
    model.eval()
    rows = config.batch_size if config.eval_iters else max(config.batch_size, EVALUATION_TOKENS // config.block_size)
    total, count = 0.0, 0
    for x, y in evaluation_batches(stream, config.block_size, rows, config.eval_iters):
        with device.autocast():
            _, loss = model(x.to(device.device), y.to(device.device))
        total += loss.item() * y.numel()
        count += y.numel()
    model.train(was_training)
    return total / count
