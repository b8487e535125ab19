"""The parts of a training step, and the milliseconds that PyTorch's profiler finds in each.

Uncompiled, hooks mark which module is computing, and a node of the backward pass belongs to the module that made it.
Compiled, products are told apart by their names and shapes; what the compiler merged into loops is one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from attention import CausalSelfAttention
from embeddings import RotaryEmbedding
from feed_forward import AttentionGate, TokenShift
from kan_layer import KANLayer
from model import Block
from pair_layer import PairLayer
from train import Trainer
from training import optimizer

SPLINES, FFN = "splines", "rest of the FFN"
FORWARD, BACKWARD = ", forward", ", backward"
ATTENTION, PROJECTIONS, ROTARY = "attention", "attention's projections", "rotary embedding, QK-norm"
NORMS, SHIFT, GATE = "norms", "token shift", "attention's gate"
EMBEDDINGS, LOSS, RESIDUALS = "embeddings", "head and loss", "residuals"
CLIPPING, OPTIMIZER, NEWTON_SCHULZ, BATCH = "gradient clipping", "optimizer, elementwise", "Newton-Schulz", "batch"
LOOPS, REST = "loops made by the compiler", "Python and the rest"

LAYER_PARTS = (SPLINES + FORWARD, SPLINES + BACKWARD, FFN + FORWARD, FFN + BACKWARD)
PARTS = (
    *LAYER_PARTS,
    ATTENTION,
    PROJECTIONS,
    ROTARY,
    GATE,
    NORMS,
    SHIFT,
    RESIDUALS,
    LOOPS,
    EMBEDDINGS,
    LOSS,
    CLIPPING,
    NEWTON_SCHULZ,
    OPTIMIZER,
    BATCH,
    REST,
)
MARK = "part: "
NODE = "autograd::engine::evaluate_function: "
# In attention, outside the modules that it has. Where attention is one operator, it includes these and the rotation.
ROTARY_OPERATORS = ("aten::rms_norm",)


def modules_of_parts(trainer: Trainer) -> Iterator[tuple[nn.Module, str]]:
    model = trainer.model
    yield model, RESIDUALS
    for module in model.modules():
        if isinstance(module, Block):
            yield module.ffn, FFN
        elif isinstance(module, CausalSelfAttention):
            yield from ((module, ATTENTION), (module.c_attn, PROJECTIONS), (module.c_proj, PROJECTIONS))
        elif isinstance(module, nn.Embedding):
            yield module, EMBEDDINGS
    yield model.head, LOSS
    kinds = {KANLayer: SPLINES, PairLayer: SPLINES, RotaryEmbedding: ROTARY, TokenShift: SHIFT, AttentionGate: GATE}
    for block in model.blocks:
        yield from ((module, kinds[type(module)]) for module in block.modules() if type(module) in kinds)
        yield from ((block.get_submodule(name), NORMS) for name in ("norm_1", "norm_2"))
    yield model.norm, NORMS


@contextmanager
def marked(trainer: Trainer) -> Iterator[None]:
    """Within this context a profile of the trainer's steps shows to which part each piece of work belongs."""
    with ExitStack() as stack:
        for owner, name, part in (
            (trainer.feed, "take", BATCH),
            (trainer.parallel, "clip_gradients", CLIPPING),
            (trainer.optimizer, "step", OPTIMIZER),
            (trainer.optimizer, "zero_grad", OPTIMIZER),
            (optimizer, "orthogonalize", NEWTON_SCHULZ),
            (optimizer, "step_through_gram", NEWTON_SCHULZ),
            (torch.nn.functional, "cross_entropy", LOSS),
        ):
            if part != LOSS or not trainer.device.compile:
                stack.enter_context(mock.patch.object(owner, name, in_part(part, getattr(owner, name))))
        if not trainer.device.compile:  # a compiler would compile the marks too
            for module, part in modules_of_parts(trainer):
                mark_module(module, part, stack)
        yield


def in_part(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def within(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function(MARK + part):
            return function(*arguments, **named)

    return within


def mark_module(module: nn.Module, part: str, stack: ExitStack) -> None:
    open_marks: list[Any] = []

    def enter(*_: Any) -> None:
        open_marks.append(torch.profiler.record_function(MARK + part))
        open_marks[-1].__enter__()

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def profiled_parts(trainer: Trainer, steps: int) -> dict[str, float]:
    """Milliseconds of a step in each part, as the profiler sees them, without Python's own time."""
    with marked(trainer), torch.profiler.profile(record_shapes=trainer.device.compile) as profile:
        for _ in range(steps):
            trainer.step()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    part_of = compiled_part(trainer) if trainer.device.compile else uncompiled_part(events)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if not event.name.startswith((MARK, "ProfilerStep")):
            parts[part_of(event)] += event.self_cpu_time_total / 1000 / steps
    return parts


def ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def node_of(event: Any) -> Any:
    """The node of the backward pass that an event is within, or None."""
    return next((each for each in ancestors(event) if each.name.startswith(NODE)), None)


def mark_of(event: Any) -> str | None:
    """The innermost mark around an event; in attention, what is not in a module of its own is told by its operator."""
    names = [each.name for each in ancestors(event)]
    mark = next((name.removeprefix(MARK) for name in names if name.startswith(MARK)), None)
    return ROTARY if mark == ATTENTION and set(names) & set(ROTARY_OPERATORS) else mark


def uncompiled_part(events: Sequence[Any]) -> Callable[[Any], str]:
    """A node of the backward pass has the sequence number of the operator that made it, the last one that has it."""
    made_by = {event.sequence_nr: mark_of(event) for event in events if node_of(event) is None}

    def part_of(event: Any) -> str:
        node = node_of(event)
        mark = mark_of(event) if node is None else made_by.get(node.sequence_nr)
        if mark in (SPLINES, FFN):
            return mark + (FORWARD if node is None else BACKWARD)
        return mark or REST

    return part_of


def compiled_part(trainer: Trainer) -> Callable[[Any], str]:
    config = trainer.model.config
    width = config.n_embd
    tokens = trainer.pass_size * config.block_size
    products = {width: PROJECTIONS, 3 * width: PROJECTIONS, config.vocab_size: LOSS}

    def part_of_product(event: Any) -> str:
        sizes = sorted({size for shape in event.input_shapes for size in shape if len(shape) == 2} - {tokens})
        others = [size for size in sizes if size != width] or [width]
        if others[0] in products:
            return products[others[0]]
        is_forward = event.input_shapes[0][:1] == [tokens] and not is_gradient(event)
        return FFN + (FORWARD if is_forward else BACKWARD)

    def part_of(event: Any) -> str:
        mark = mark_of(event)
        name = next(
            (each.name for each in ancestors(event) if each.name.startswith(("splinegpt::", "aten::_scaled"))), ""
        )
        if mark is not None:
            return mark
        if name.startswith("aten::_scaled") or "attention" in name:
            return ATTENTION
        if name.startswith("splinegpt::"):
            return SPLINES + (BACKWARD if "backward" in name else FORWARD)
        if event.name in ("aten::mm", "aten::addmm"):
            return part_of_product(event)
        is_loop = any("CompiledFxGraph" in each.name for each in ancestors(event))
        return LOOPS if is_loop else REST

    return part_of


def is_gradient(event: Any) -> bool:
    """Whether it runs in the backward pass."""
    return any("Backward" in each.name for each in ancestors(event))
