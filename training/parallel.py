"""The model as training steps use it: alone, replicated over processes (DDP), or sharded over them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from training.device import Device
from training.distributed import World
from training.errors import UserError


class ParallelModel:
    """Forward and backward passes whose gradients are the mean over all processes, compiled if the device says so.

    `model` is the GPT itself: to evaluate, to save, and to make the optimizer of. Its parameters are DTensors if it is
    sharded, and then all processes must go through its layers together.
    """

    def __init__(self, model: GPT, device: Device, world: World, fsdp: bool) -> None:
        """`model`: the same on every process; on the device, or on the CPU if it is to be sharded."""
        self.model, self.device, self.sharded = model, device, fsdp
        self._replica: DistributedDataParallel | None = None
        step_model: nn.Module = model
        if fsdp:
            shard(model, device, world)
        elif world.size > 1:
            ids = [device.device] if device.device.type == "cuda" else None
            self._replica = step_model = DistributedDataParallel(model, device_ids=ids)
        self._step_model: Any = torch.compile(step_model) if device.compile and not fsdp else step_model

    def train(self) -> None:
        self._step_model.train()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy of one pass: x and y (sequences, block_size) → ()."""
        with self.device.autocast():
            return self._step_model(x.to(self.device.device), y.to(self.device.device))[1]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around a forward and backward pass; gradients are exchanged in a step's last one only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with self._replica.no_sync() if self._replica is not None and not last else nullcontext():
            yield

    def settle(self, x: Tensor, y: Tensor) -> None:
        """One pass whose gradients are thrown away, so that a resumed run adds in the order of the uninterrupted one.

        DDP groups gradients into buckets anew after its first backward pass, in the order in which they came. Where in
        a bucket a gradient lies decides in which order the processes' parts are added, if there are more than two.
        """
        if self._replica is None:
            return
        self.train()
        self.loss(x, y).backward()
        self.model.zero_grad(set_to_none=True)

    def clip_gradients(self, limit: float) -> float:
        """Scale the whole gradient down to the norm `limit`; returns the norm that it had."""
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return float(norm.full_tensor() if self.sharded else norm)

    def is_finite(self) -> bool:
        """Whether this process's parameters are."""
        return all(bool(local(parameter).isfinite().all()) for parameter in self.model.parameters())

    def whole(self) -> GPT | None:
        """The model in one piece, to draw and sample with: a copy on the CPU, of the main process only, if sharded.

        Every process must call it.
        """
        if not self.sharded:
            return self.model
        state = {name: full(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        if torch.distributed.get_rank():
            return None
        copy = GPT(self.model.config)
        copy.load_state_dict(state)
        return copy


def check_shardable(device: Device, world: World) -> None:
    """UserError if `--fsdp True` cannot work here."""
    if world.size == 1:
        raise UserError("fsdp shares a model among several processes; start with torchrun, or leave --fsdp out")
    if device.dtype is torch.float16:
        raise UserError("fsdp does not scale the losses of dtype float16; use --dtype bfloat16 or float32")


def shard(model: GPT, device: Device, world: World) -> None:
    """Cut every parameter over all processes, block by block (FSDP2), in place.

    Parameters, moments and the sums of gradients stay float32; in bfloat16 the copies that travel to the processes
    for a block's passes are bfloat16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = device.dtype if device.dtype is torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.device.type, (world.size,))
    for block in model.blocks:
        if device.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for layer in model.spline_layers():
        layer._choose_backend()  # its weight may have moved to another device


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """The tensor in one piece. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
