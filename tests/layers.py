"""Spline layers with random parameters, for the tests."""

import torch
from torch import nn

from backends import semi_structured
from kan_layer import KANLayer


def random_layer(
    in_features: int,
    out_features: int,
    knots: int,
    width: float = 4.0,
    impl: str = "auto",
    *,
    seed: int | None = None,
    scale: float = 1.0,
    **options: object,
) -> KANLayer:
    """A layer whose parameters are all drawn from N(0, scale²): by PyTorch's generator, or one with `seed`.

    `knots` does not matter to semi_structured, which computes one grid only. `options` are further ones of KANLayer.
    """
    if impl == "semi_structured":
        knots = semi_structured.POINTS
    layer = KANLayer(in_features, out_features, num_control_points=knots, spline_width=width, impl=impl, **options)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=scale, generator=generator)
    return layer
