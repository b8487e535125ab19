"""A case to time: the shape of a layer, and the work that computing it takes at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHT_BYTES = INPUT_BYTES = 4  # always float32: autocast changes only the arithmetic and the output


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must cross between memory and processor."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """N tokens through a layer with `width` inputs and outputs and `grid` control points. bfloat16 means autocast."""

    tokens: int
    width: int
    grid: int
    dtype: str

    def hidden(self, matrices: int) -> int:
        """Hidden size with which `matrices` weight matrices have as many parameters as the spline layer."""
        return round(self.grid * self.width / matrices)

    def spline_work(self, training: bool) -> Work:
        """Two multiply-adds for every token, input and output, whatever G is.

        Training adds two for the gradient of the control points and one for the gradient of x. Backends that also
        multiply by zeros, as those on tensor cores do, compute about G/2 times as much.
        """
        multiply_adds = (5 if training else 2) * self.tokens * self.width**2
        return Work(2 * multiply_adds, self._traffic(training))

    def matrix_work(self, parameters: int, training: bool) -> Work:
        """One multiply-add for every token and parameter; training adds two for the gradients."""
        multiply_adds = (3 if training else 1) * self.tokens * parameters
        return Work(2 * multiply_adds, self._traffic(training))

    def _traffic(self, training: bool) -> float:
        """Bytes if x, y and the weights cross once. Training also reads dy, x and the weights, and writes dx and dW."""
        x = self.tokens * self.width * INPUT_BYTES
        y = self.tokens * self.width * DTYPES[self.dtype].itemsize
        weights = self.width * self.grid * self.width * WEIGHT_BYTES
        return 3 * x + 2 * y + 3 * weights if training else x + y + weights

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.width}, G={self.grid}, {self.dtype}"
