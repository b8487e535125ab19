"""The model as the page holds it, to run there: its options, its vocabulary, its weights in 24-bit fixed point.

One block, base64. The splines of the newest recorded step are in the page anyway (packing); where they are the model's
own, and all of them fit, they are not stored twice.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kan_layer import KANLayer, to_numpy
from model import GPT
from splines.grid import Array
from splines.snapshot import Snapshot
from training.activations import layer_names
from training.checkpoint import LoadedCheckpoint
from webpage.packing import BUDGET, ZERO, base64_sizes, fixed_point

LARGEST = 11_000_000  # bytes of base64: what is left of the page's budget shows the splines
FEED_FORWARDS = ("splines", "gated_splines", "mlp", "mlp_tanh", "relu2", "swiglu")  # that model.js has
OPTIONS = (
    "n_layer", "n_head", "n_embd", "block_size", "ffn", "position", "norm", "qk_norm", "ffn_norm",
    "attention_gate", "token_shift",
)  # fmt: skip


@dataclass
class PackedModel:
    """`metadata` for the page's script, and the block that it refers to."""

    metadata: dict[str, Any]
    block: str
    shares_splines: bool
    """Whether the splines are those of the newest recorded step, which the page must then hold whole."""


def why_not(name: str, ffn: str) -> str | None:
    """Why the page cannot run a model with this tokenizer and feed-forward layer, as a sentence; None if it can."""
    if name != "char":
        return "There is no live model here: the page reads text by character, and this model reads GPT-2's byte pairs."
    if ffn not in FEED_FORWARDS:
        return f"There is no live model here: the page can run the blocks {', '.join(FEED_FORWARDS)}, not {ffn}."
    return None


def pack_model(checkpoint: LoadedCheckpoint, newest: Sequence[Snapshot], budget: int = BUDGET) -> PackedModel | str:
    """The model, or a sentence on why the page has none. `newest`: its splines as last recorded, [] if never.

    The weights take at most LARGEST bytes, and with shared splines leave room for one step of them within `budget`.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    reason = why_not(tokenizer.name, model.config.ffn)
    if reason is not None:
        return reason
    shared = are_same(model.spline_layers(), newest)
    if shared and base64_size(weights(model, tokenizer.vocab_size, False)) + sum(base64_sizes(newest)) > budget:
        shared = False
    arrays = weights(model, tokenizer.vocab_size, not shared)
    size = base64_size(arrays)
    if size > LARGEST:
        return (
            f"There is no live model here: its {model.num_parameters():,} parameters would take {size / 1e6:.0f} MB of "
            f"the page, which has {LARGEST / 1e6:.0f} MB for them."
        )
    data, where = bytearray(), {}
    for name, values in arrays.items():
        scale = float(np.abs(values).max(initial=0.0)) / (ZERO - 1) or 1.0
        where[name] = {"offset": len(data), "count": values.size, "scale": scale}
        data.extend(fixed_point(values, scale))
    metadata = {
        "step": checkpoint.step,
        "vocabulary": [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)],
        "block": "weights",
        "tensors": where,
        "splines": [describe(path, name, layer, shared) for path, name, layer in named_splines(model)],
        "pair_rows": len(model.pair_embedding.table.weight) if model.pair_embedding is not None else 0,
        "pair_base": model.config.vocab_size,
        **{name: getattr(model.config, name) for name in OPTIONS},
    }
    return PackedModel(metadata, base64.b64encode(data).decode(), shared)


def weights(model: GPT, vocab_size: int, with_splines: bool) -> dict[str, Array]:
    """What the forward pass needs, by name: parameters, and control points in place of what spline layers store.

    Without the rows that pad a vocabulary, and without the output layer where it is the embedding.
    """
    splines = {path for path, _, _ in named_splines(model)}
    arrays = {
        name: to_numpy(parameter)
        for name, parameter in model.named_parameters()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in splines)
    }
    for name in {"token_embedding.weight", "head.weight"} & set(arrays):
        arrays[name] = arrays[name][:vocab_size]
    if with_splines:
        arrays |= {f"{path}.points": to_numpy(layer.control_points()) for path, _, layer in named_splines(model)}
    return arrays


def base64_size(arrays: dict[str, Array]) -> float:
    return 4 / 3 * 3 * sum(array.size for array in arrays.values())


def named_splines(model: GPT) -> list[tuple[str, str, KANLayer]]:
    """Path, name for people, and layer, of each spline layer; in the order of `GPT.spline_layers`."""
    paths = [path for path, module in model.named_modules() if isinstance(module, KANLayer)]
    return list(zip(paths, layer_names(model), model.spline_layers(), strict=True))


def describe(path: str, name: str, layer: KANLayer, shared: bool) -> dict[str, Any]:
    return {
        "path": path,
        "name": name,
        "I": layer.in_features,
        "O": layer.out_features,
        "G": layer.num_control_points,
        "width": layer.spline_width,
        "shared": shared,
    }


@torch.no_grad()
def are_same(layers: Sequence[KANLayer], snapshots: Sequence[Snapshot]) -> bool:
    """Whether the snapshots hold all splines of the layers, as they are."""
    return len(layers) == len(snapshots) > 0 and all(
        snapshot.is_whole
        and snapshot.spline_width == layer.spline_width
        and np.array_equal(snapshot.control_points, to_numpy(layer.control_points()))
        for layer, snapshot in zip(layers, snapshots, strict=True)
    )
