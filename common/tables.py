"""Buffers that follow from a module's arguments, such as rotary angles: in no checkpoint, never without contents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """A module of constant tables, as buffers that are not part of its state_dict.

    New memory may come without contents: `to_empty`, say, after a model was built on the meta device, and no checkpoint
    fills them then. So they are computed again whenever the module gets new memory, in whatever dtype it then has.
    """

    def compute_tables(self) -> dict[str, Tensor]:
        """All tables by name, on the CPU, whatever the default device."""
        raise NotImplementedError

    def register_tables(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Compute the tables and make them buffers; by default on the default device, in their own dtype."""
        device = torch.get_default_device() if device is None else device
        for name, table in self.compute_tables().items():
            self.register_buffer(name, table.to(device, dtype), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Tables:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if any(self._buffers[name] is not buffer for name, buffer in before.items()):
            self._fill(None)
        return self

    def _fill(self, device: torch.device | None) -> None:
        """Compute the tables where they lie, or on `device` those that lie nowhere (on the meta device)."""
        for name, table in self.compute_tables().items():
            buffer = self.get_buffer(name)
            where = device if buffer.is_meta else buffer.device
            if where is not None:
                self._buffers[name] = table.to(where, buffer.dtype)


def fill_tables(module: nn.Module, _: object = None) -> None:
    """Give the tables within `module` that are on the meta device a place beside its parameters, where these have one.

    A hook for after loading, since `load_state_dict(…, assign=True)` brings parameters to a model on the meta device.
    """
    device = next(module.parameters()).device
    for part in module.modules():
        if isinstance(part, Tables) and device.type != "meta":
            part._fill(device)
