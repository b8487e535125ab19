"""The model as training steps use it: alone, replicated over processes (DDP), or sharded over them (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
from training.sharded_tensors import full, like, local


class ParallelModel:
    """Runs forward and backward passes whose gradients are the mean over all processes. Compiles them if asked to.

    `model` is the GPT itself, which is evaluated, saved and given to the optimizer. If it is sharded, its parameters
    are DTensors, and all processes must go through its layers together.
    """

    def __init__(self, model: GPT, device: Device, world: World, fsdp: bool) -> None:
        """`model` has the same parameters on every process. It is on the device, or on the CPU to be sharded."""
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
        # The blocks of a sharded model are compiled one by one (`shard`): their parameters are gathered and freed.
        self._step_model: Any = torch.compile(step_model) if self.device.compile and not self.sharded else step_model

    def use(self, device: Device) -> None:
        """Replace the settings of the device, for example to go on uncompiled."""
        self.device = device
        self.wrap()

    def __str__(self) -> str:
        """A clause that says how processes share the model; empty for one process."""
        how = "sharded over (FSDP2)" if self.sharded else "replicated on (DDP)"
        return f"; {how} {self.world.size} processes" if self.world.size > 1 else ""

    def train(self) -> None:
        self._step_model.train()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy of one micro-batch: x and y (sequences, block_size) → ()."""
        with self.device.autocast():
            return self._step_model(x.to(self.device.device), y.to(self.device.device))[1]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Surrounds a forward and backward pass. Only the last one of a step exchanges gradients."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with self._replica.no_sync() if self._replica is not None and not last else nullcontext():
            yield

    def run_throwaway_pass(self, x: Tensor, y: Tensor) -> None:
        """Run one throwaway backward pass with DDP, so that a resumed run gives the numbers of an uninterrupted one.

        DDP regroups gradients into buckets after its first backward pass, in the order in which they arrived. With more
        than two processes, the place of a gradient in its bucket decides the order in which the processes' parts are
        added, and so the rounding.
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
        """Whether all parameters, or this process's part of them, are finite."""
        return all(bool(local(parameter).isfinite().all()) for parameter in self.model.parameters())

    def sharded_state(self, header: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
        """The state for a sharded checkpoint, a ShardedState."""
        from training.sharded_checkpoint import sharded_state  # takes half a second to import, and few runs need it

        return sharded_state(header, self.model, optimizer)

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
        """Fill parameters and moments in place from the checkpoint at `path`, sharded or not.

        `state` is what `open_checkpoint` returned for it. RuntimeError, ValueError or KeyError if it does not fit.
        """
        if state["model"] is None:  # the checkpoint is sharded
            if self.sharded:
                from training.sharded_checkpoint import Shards

                Shards(path).restore(self.model, optimizer)
                return
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
        """The whole model, to draw and sample with. Every process must call it.

        If the model is sharded, the main process gets a copy on the CPU and the others get None.
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
    """Raise UserError if `--fsdp True` cannot work here."""
    if world.size == 1:
        raise UserError("fsdp shares a model among several processes; start with torchrun, or leave --fsdp out")
    if device.dtype is torch.float16:
        raise UserError("fsdp does not scale the losses of dtype float16; use --dtype bfloat16 or float32")


def shard(model: GPT, device: Device, world: World) -> None:
    """Shard every parameter over all processes, block by block, in place (FSDP2).

    Parameters, moments and sums of gradients stay float32. With dtype bfloat16, the parameters that processes send each
    other before a block's passes are bfloat16, except those of spline layers. These compute with differences of control
    points, which would be lost if the control points were rounded first.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = device.dtype if device.dtype is torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.device.type, (world.size,))
    if narrow is not None:
        # Of results that are changed in place, which no block does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        for layer in (*model.spline_layers(), *model.pair_layers()):
            fully_shard(layer, mesh=mesh, mp_policy=replace(policy, param_dtype=None))
    for block in model.blocks:
        if device.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
