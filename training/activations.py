"""Collects the activations that reach a model's spline layers, and takes snapshots of the layers with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from corpus.batches import Batch, evaluation_batches
from corpus.dataset import TokenStream
from model import GPT
from splines.snapshot import Snapshot

Batches = Iterable[Tensor | Sequence[Tensor]]

MAX_TOKENS = 2048  # shares of activations are then accurate to a percent, and a checkpoint takes 1 to 2 % longer
TOKENS_AT_ONCE = 1024  # in one forward pass, which bounds the memory for logits


def take_snapshots(model: GPT, batches: Batches) -> list[Snapshot]:
    """Take a snapshot of every spline layer of the (uncompiled) model. Without `batches` it has no activations."""
    layers = model.spline_layers()
    if not layers:
        return []
    inputs, tokens = layer_inputs(model, batches)
    seen: Sequence[Tensor | None] = inputs or [None] * len(layers)
    names = layer_names(model)
    return [layer.snapshot(seen[k], tokens, k, names[k]) for k, layer in enumerate(layers)]


def layer_names(model: GPT) -> list[str]:
    """The layers' names: "layer 0" and so on, or block and place if any block has several spline layers."""
    layers = {id(layer) for layer in model.spline_layers()}
    paths = [path for path, module in model.named_modules() if id(module) in layers]
    blocks = [re.match(r"blocks\.(\d+)\.", path) for path in paths]
    if not all(blocks) or len({block[1] for block in blocks if block}) == len(paths):
        return [f"layer {number}" for number in range(len(paths))]
    places = ["attention gate" if ".attn." in path else "feed-forward" for path in paths]
    return [f"block {block[1]}, {place}" for block, place in zip(blocks, places, strict=True) if block]


@torch.no_grad()
def layer_inputs(model: GPT, batches: Batches) -> tuple[list[Tensor], Tensor | None]:
    """Run the (uncompiled) model, and return each spline layer's inputs, (M, I) each, and the M tokens they belong to.

    M is at most MAX_TOKENS. A batch is tokens (B, T), or a pair of tokens and targets. Only as many batches are drawn
    as needed. Without batches, returns [] and None.
    """
    layers = model.spline_layers()
    seen: list[list[Tensor]] = [[] for _ in layers]
    texts: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, store=store: store.append(args[0].flatten(0, -2)))
        for layer, store in zip(layers, seen, strict=True)
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        missing = MAX_TOKENS
        for batch in batches:
            tokens = batch if isinstance(batch, Tensor) else batch[0]
            tokens = tokens[: math.ceil(missing / tokens.shape[1])]
            for rows in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
                model(rows.to(device))
                texts.append(rows.flatten())
            missing -= tokens.numel()
            if missing <= 0:
                break
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not texts:
        return [], None
    return [torch.cat(store)[:MAX_TOKENS] for store in seen], torch.cat(texts)[:MAX_TOKENS]


def picture_batches(stream: TokenStream, block_size: int) -> list[Batch]:
    """The text whose activations the histograms show, MAX_TOKENS of it; the same at every call."""
    length = min(block_size, len(stream) - 1)
    rows = max(1, TOKENS_AT_ONCE // length)
    return list(evaluation_batches(stream, length, rows, math.ceil(MAX_TOKENS / (rows * length))))
