"""Other projects' layers as the feed-forward layer of a block, for races."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from bench.shared.case import Case
from bench.shared.peers import PEERS, Layers, build_peer
from feed_forward import FEED_FORWARDS
from model import GPT, GPTConfig

GRIDS = range(2, 33)


def register(layers: Layers) -> None:
    """Let `ffn = NAME` choose that peer, n_embd → n_embd, with about as many parameters as the 4x MLP."""
    for name, layer in layers.items():
        FEED_FORWARDS[name] = partial(peer_block, name, layer)


def peer_block(name: str, layer: type[nn.Module], config: GPTConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the search for the grid must not change the model's random numbers
        sizes = {grid: num_parameters(build(name, layer, config.n_embd, grid)) for grid in GRIDS}
    grid = min(GRIDS, key=lambda grid: abs(sizes[grid] - 8 * config.n_embd**2))
    return build(name, layer, config.n_embd, grid)


def build(name: str, layer: type[nn.Module], width: int, grid: int) -> nn.Module:
    peer = PEERS[name]
    keywords = next(iter(peer.modes(grid).values()))
    return build_peer(peer, layer, Case(tokens=1, width=width, grid=grid, dtype="float32"), keywords)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def restore_own_init(model: GPT, seed: int) -> None:
    """Restore the initial values that other projects' layers choose themselves, which the GPT's init has replaced."""
    if model.config.ffn not in PEERS:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.blocks:
            fresh = FEED_FORWARDS[model.config.ffn](model.config)
            block.ffn.load_state_dict(fresh.state_dict())  # type: ignore[union-attr]
