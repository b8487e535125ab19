"""Embeddings in addition to the token's own: of its pair with the previous token, and of its position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.tables import Tables


class PairEmbedding(nn.Module):
    """An embedding of each pair of a token and the previous one (Huang et al. 2025, "over-encoding").

    With vocab_size² rows every pair has its own; with fewer, pairs are hashed onto the rows.
    """

    def __init__(self, vocab_size: int, rows: int, width: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.table = nn.Embedding(min(rows, vocab_size**2), width)

    def forward(self, tokens: Tensor, before: Tensor | None) -> Tensor:
        """tokens (B, T) → (B, T, C). `before` (B, 1) precedes them; without it the first token gets zeros."""
        if before is not None:
            tokens = torch.cat((before, tokens), dim=1)
        embedded = self.table(self._rows(tokens[:, :-1].long() * self.vocab_size + tokens[:, 1:]))
        return embedded if before is not None else F.pad(embedded, (0, 0, 1, 0))

    def _rows(self, pairs: Tensor) -> Tensor:
        """Row of each pair; hashed if there are fewer rows than pairs."""
        rows = self.table.num_embeddings
        if rows == self.vocab_size**2:
            return pairs
        return hashed(pairs) % rows


def hashed(numbers: Tensor) -> Tensor:
    """The last stage of SplitMix64 (Steele et al. 2014), a hash that maps int64 one to one onto int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        unsigned = numbers >> shift & (1 << 64 - shift) - 1  # a shift that fills with zeros
        numbers = (numbers ^ unsigned) * (factor - (factor >> 63 << 64))  # the factor as a signed integer
    return numbers


class RotaryEmbedding(Tables):
    """Rotates pairs of features by an angle that grows with the position (Su et al. 2021, base 10,000)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, block_size: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.block_size = block_size
        self.register_tables()

    def compute_tables(self) -> dict[str, Tensor]:
        frequency = 10_000.0 ** (-torch.arange(0, self.head_dim, 2, device="cpu") / self.head_dim)  # (head_dim/2,)
        angle = torch.outer(torch.arange(self.block_size, device="cpu"), frequency)  # (block_size, head_dim/2)
        return {"cos": angle.cos(), "sin": angle.sin()}

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate x (B, heads, T, head_dim), whose first token is at position `start`."""
        cos, sin = (angle.to(x.dtype) for angle in self.angles(start, start + x.shape[2]))
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

    def angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at these positions, both (stop - start, head_dim / 2)."""
        return self.cos[start:stop], self.sin[start:stop]
