"""Constant buffers, such as rotary angles: computed from a module's arguments and not stored in checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """A module with constant tables, which are buffers outside its state_dict.

    When a module gets new memory, that may be uninitialized, for example by `to_empty` after building on the meta
    device, and no checkpoint would fill the tables. So they are computed again, in the dtype that they then have.
    """

    def compute_tables(self) -> dict[str, Tensor]:
        """Compute all tables, by name, on the CPU even if another device is the default."""
        raise NotImplementedError

    def register_tables(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Compute the tables and register them as buffers, by default on the default device and in their own dtype."""
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
        """Compute the tables again on the device of their buffers; on `device` if that is the meta device."""
        for name, table in self.compute_tables().items():
            buffer = self.get_buffer(name)
            where = device if buffer.is_meta else buffer.device
            if where is not None:
                self._buffers[name] = table.to(where, buffer.dtype)


def fill_tables(module: nn.Module, _: object = None) -> None:
    """Move the tables in `module` from the meta device to the device of its parameters, unless these are there too.

    A hook to call after loading, because `load_state_dict(…, assign=True)` takes only parameters off the meta device.
    """
    device = next(module.parameters()).device
    for part in module.modules():
        if isinstance(part, Tables) and device.type != "meta":
            part._fill(device)
