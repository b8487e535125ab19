"""The model as training steps use it: alone, replicated over processes (DDP), or sharded over them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from model import GPT
from training.checkpoint import read_state
from training.device import Device
from training.distributed import World
from training.optimizer import load_state
from training.shards import full, like, local


class ParallelModel:
    """Forward and backward passes whose gradients are the mean over all processes, compiled if the device says so.

    `model` is the GPT itself: to evaluate, to save, and to make the optimizer of. Its parameters are DTensors if it is
    sharded, and then all processes must go through its layers together.
    """

    def __init__(self, model: GPT, device: Device, world: World, fsdp: bool) -> None:
        """`model`: the same on every process; on the device, or on the CPU if it is to be sharded."""
        self.model, self.device, self.world, self.sharded = model, device, world, fsdp
        self._replica: DistributedDataParallel | None = None
        if fsdp:
            shard(model, device, world)
        self.wrap()

    def wrap(self) -> None:
        """Build the wrapped model (DDP, compiled) that steps call; call again after parameters were replaced."""
        step_model: nn.Module = self.model
        if self.world.size > 1 and not self.sharded:
            ids = [self.device.device] if self.device.device.type == "cuda" else None
            self._replica = step_model = DistributedDataParallel(self.model, device_ids=ids)
        # The blocks of a sharded model are compiled one by one, since their parameters come and go.
        self._step_model: Any = torch.compile(step_model) if self.device.compile and not self.sharded else step_model

    def use(self, device: Device) -> None:
        """Go on as `device`, the same one, says now: compiled or not."""
        self.device = device
        self.wrap()

    def __str__(self) -> str:
        """Its words in the line about the device; empty for one process."""
        how = "sharded over (FSDP2)" if self.sharded else "replicated on (DDP)"
        return f"; {how} {self.world.size} processes" if self.world.size > 1 else ""

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

    def run_throwaway_pass(self, x: Tensor, y: Tensor) -> None:
        """One pass whose gradients are thrown away, so that a resumed run adds them in the uninterrupted run's order.

        DDP regroups gradients into buckets after its first backward pass, in the order in which they came. With more
        than two processes the place of a gradient in a bucket decides the order in which their parts are added.
        """
        if self._replica is None:
            return
        self.train()
        self.loss(x, y).backward()
        self.model.zero_grad(set_to_none=True)

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the whole gradient down to the norm `limit`; returns the norm that it had, still on the device."""
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return norm.full_tensor() if self.sharded else norm

    def is_finite(self) -> bool:
        """Whether this process's parameters are."""
        return all(bool(local(parameter).isfinite().all()) for parameter in self.model.parameters())

    def sharded_state(self, header: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
        """For a checkpoint in pieces."""
        from training.sharded_checkpoint import sharded_state  # half a second of imports that others need not wait for

        return sharded_state(header, self.model, optimizer)

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
        """Fill parameters and moments from a checkpoint of either kind, in place.

        `state`: what `open_checkpoint` gave for `path`. RuntimeError, ValueError or KeyError if it does not fit.
        """
        if self.sharded and path.is_dir():
            from training.sharded_checkpoint import ShardedCheckpoint

            ShardedCheckpoint.open(path, verify=False).restore(self.model, optimizer)
            return
        if path.is_dir():
            state = read_state(path)
        model_state, moments = state["model"], state["optimizer"]
        if self.sharded:
            named = dict(self.model.state_dict())
            model_state = {name: like(named[name], tensor) for name, tensor in model_state.items()}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            own = {i: {k: like(parameters[i], t) for k, t in m.items()} for i, m in moments["state"].items()}
            moments = {**moments, "state": own}
        self.model.load_state_dict(model_state)
        load_state(optimizer, moments)

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
