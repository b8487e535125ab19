"""Every backend under PyTorch's transforms: forward mode, torch.func, second derivatives, export to ONNX."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import backends
import backends.pairs
from kan_layer import KANLayer
from model import GPT, GPTConfig
from tests import spline_reference
from tests.layers import random_layer
from tests.test_backends import every_impl, inputs_of_every_kind, relative_error

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
TWICE_DIFFERENTIABLE = [name for name in backends.BACKENDS if name != "embedding_bag"]


def weights(layer: KANLayer) -> dict[str, torch.Tensor]:
    return {"weight": layer.weight.detach()}


def gradients(layer: KANLayer, x: torch.Tensor, dy: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x and of the control points by the float64 definition."""
    arrays = (tensor.detach().double().numpy() for tensor in (x, layer.control_points()))
    return spline_reference.gradients(*arrays, layer.spline_width, dy.double().numpy())


def jacobian(layer: KANLayer, x: torch.Tensor) -> np.ndarray:
    """The Jacobian (N, O, N, I) by the float64 definition, row by row."""
    tokens, outputs = len(x), layer.out_features
    rows = torch.eye(tokens * outputs).unflatten(1, (tokens, outputs))
    return np.stack([gradients(layer, x, row)[0] for row in rows]).reshape(tokens, outputs, *x.shape)


def by_torch_func(layer: KANLayer, x: torch.Tensor, w: torch.Tensor, dx: torch.Tensor, dw: torch.Tensor):
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {"weight": w}, (x,))

    return jvp(f, (x, w), (dx, dw))


def by_dual_numbers(layer: KANLayer, x: torch.Tensor, w: torch.Tensor, dx: torch.Tensor, dw: torch.Tensor):
    with forward_ad.dual_level():
        dual_w = {"weight": forward_ad.make_dual(w, dw)}
        return forward_ad.unpack_dual(functional_call(layer, dual_w, (forward_ad.make_dual(x, dx),)))


def compiled(layer: KANLayer, *tensors: torch.Tensor):
    torch._dynamo.reset()
    return torch.compile(lambda *tensors: by_torch_func(layer, *tensors), backend="eager", fullgraph=True)(*tensors)


@every_impl
@pytest.mark.parametrize(
    ("forward_mode", "grid"),
    [(by_torch_func, 5), (by_torch_func, 11), (by_dual_numbers, 5), (by_dual_numbers, 11), (compiled, 5)],
)
def test_forward_mode_is_the_adjoint_of_the_gradients(impl: str, forward_mode: Callable, grid: int) -> None:
    layer = random_layer(4, 7, grid, 4.0, impl)
    x = inputs_of_every_kind(3, 4, layer.num_control_points, 4.0).clamp(-40, 40)
    w = layer.weight.detach()
    dx, dw, dy = torch.randn_like(x), torch.randn_like(w), torch.randn(len(x), 7)
    y, tangent = forward_mode(layer, x, w, dx, dw)
    torch.testing.assert_close(y, layer(x).detach(), rtol=1e-4, atol=1e-4)
    back_x, back_w = gradients(layer, x, dy)
    truth = (back_x * dx.double().numpy()).sum(1)  # sum per token, without the part from the control points
    from_w = by_torch_func(layer, x, w, torch.zeros_like(dx), dw)[1]
    assert relative_error(((tangent - from_w) * dy).sum(1), truth) < 1e-4
    whole = (back_w * dw.double().numpy()).sum()
    size = (from_w * dy).abs().sum().item()
    assert abs((from_w.double() * dy).sum().item() - whole) < 1e-5 * size


@every_impl
@pytest.mark.parametrize("transform", [jacfwd, jacrev])
def test_jacobians(impl: str, transform: Callable) -> None:
    layer = random_layer(4, 3, 6, 4.0, impl)
    x = inputs_of_every_kind(1, 4, layer.num_control_points, 4.0)
    assert relative_error(transform(layer)(x), jacobian(layer, x)) < 1e-5


@every_impl
def test_jacobians_of_a_graph_that_is_there_already(impl: str) -> None:
    layer = random_layer(4, 3, 6, 4.0, impl)
    x = torch.randn(5, 4, requires_grad=True)
    y = layer(x)
    rows = torch.eye(15).unflatten(1, (5, 3))
    with warnings.catch_warnings():  # vmap warns that kernels do these one by one
        warnings.filterwarnings("ignore", "There is a performance drop")
        (batched,) = torch.autograd.grad(y, x, rows, is_grads_batched=True)
    assert relative_error(batched.unflatten(0, (5, 3)), jacobian(layer, x)) < 1e-5


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_each_sample(impl: str, dtype: torch.dtype) -> None:
    layer = random_layer(4, 3, 6, 4.0, impl, dtype=dtype)
    x, dy = torch.randn(5, 7, 4, dtype=dtype), torch.randn(5, 7, 3, dtype=dtype)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return (functional_call(layer, parameters, (x,)) * dy).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights(layer), x, dy)["weight"]
    truth = np.stack([gradients(layer, *sample)[1] for sample in zip(x, dy, strict=True)])
    assert relative_error(each, truth) < (1e-5 if dtype is torch.float32 else 1e-12)


@every_impl
def test_an_ensemble_of_layers(impl: str) -> None:
    layers = [random_layer(4, 3, 6, 4.0, impl) for _ in range(3)]
    x = torch.randn(3, 5, 4)
    parameters, buffers = stack_module_state(layers)
    y = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(parameters, buffers, x)
    truth = torch.stack([layer(each) for layer, each in zip(layers, x, strict=True)])
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)


@every_impl
def test_a_hessian_is_that_of_the_definition(impl: str) -> None:
    layer = random_layer(4, 3, 6, 4.0, impl)
    x = torch.randn(2, 4)
    slopes = jacobian(layer, x)  # for straight splines the Hessian of the sum of squares is 2 JᵀJ
    truth = 2 * np.einsum("notj,noui->tjui", slopes, slopes)
    assert relative_error(hessian(lambda x: layer(x).square().sum())(x), truth) < 1e-5


@pytest.mark.parametrize("impl", TWICE_DIFFERENTIABLE)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_second_derivatives_are_the_differences_of_gradients(impl: str, autocast: bool) -> None:
    layer = random_layer(4, 7, 6, 4.0, impl)
    points = layer.num_control_points
    spacing = 4.0 / (points - 1)
    middles = torch.randint(-1, points, (30, 4)) + 0.2 + 0.6 * torch.rand(30, 4)  # away from knots; some outside
    x = (middles * spacing - 2).requires_grad_()
    dy, v, u = torch.randn(30, 7), torch.randn(30, 4), torch.randn_like(layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy.to(y.dtype), create_graph=True)
    second = torch.autograd.grad((dx * v).sum() + (dw * u).sum(), (x, layer.weight))
    step = 1e-3
    shifted = copy.deepcopy(layer)
    differences = []
    for sign in (1, -1):
        with torch.no_grad():
            shifted.weight.copy_(layer.weight + sign * step * u)
        differences.append((gradients(shifted, x, dy)[0], gradients(layer, x + sign * step * v, dy)[1]))
    # By symmetry the gradient of dx·v + dw·u in x is the derivative of dx in direction (v, u), which is linear in v.
    for value, ahead, behind in zip(second, *differences, strict=True):
        assert relative_error(value, (ahead - behind) / (2 * step)) < (2e-2 if autocast else 1e-3)


@pytest.mark.parametrize("impl", ["embedding_bag", "native", "auto"])
def test_second_derivatives_that_are_missing_name_impls_that_have_them(impl: str) -> None:
    layer = random_layer(4, 3, 6, 4.0, impl, dtype=torch.float64)
    if layer.resolved_impl not in ("embedding_bag", "native"):
        pytest.skip("native cannot be built here")
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; choose an impl that has: dense, csr") as refusal:
        dx.sum().backward()
    for name in str(refusal.value).split("has: ")[1].split(", "):
        layer = KANLayer(4, 3, num_control_points=6, impl=name, dtype=torch.float64)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        dx.sum().backward()


OPERATORS = {
    "attention": lambda x, w: torch.ops.splinegpt.attention(x.reshape(1, 2, 6), None, None, 1, True)[0],
    "attention_backward": lambda x, w: torch.ops.splinegpt.attention_backward(
        x.new_ones(1, 2, 2), x.new_ones(1, 1, 2, 2), x.reshape(1, 2, 6), None, None, 1, True
    ),
    "mode_sums": lambda x, w: torch.ops.splinegpt.mode_sums(x.reshape(1, 2, 2, 3), w[0, :2], w[1, :2]),
    "native": lambda x, w: torch.ops.splinegpt.native(x, w, 4.0, torch.float32),
    "native_backward": lambda x, w: torch.ops.splinegpt.native_backward(x.new_ones(3, 2), x, w, 4.0)[0],
    "pairs": lambda x, w: torch.ops.splinegpt.pairs(x, x, w.unsqueeze(1).expand(-1, 5, -1, -1), 4.0),
    "pairs_backward": lambda x, w: torch.ops.splinegpt.pairs_backward(
        x.new_ones(3, 2), x, x, w.unsqueeze(1).expand(-1, 5, -1, -1), 4.0
    )[0],
    "chunked": lambda x, w: torch.ops.splinegpt.chunked(x, w, 4.0, torch.float32),
    "chunked_backward": lambda x, w: torch.ops.splinegpt.chunked_backward(x.new_ones(3, 2), x, w, 4.0, [True, True])[0],
    "slopes": lambda x, w: torch.ops.splinegpt.slopes(x, x.new_ones(3, 16, dtype=torch.bfloat16), 5, 4.0),
    "basis": lambda x, w: torch.ops.splinegpt.basis(x, 5, 4.0, True),
    "csr_matmul": lambda x, w: torch.ops.splinegpt.csr_matmul(
        x.flatten(), columns(), 4, w.flatten(0, 1), torch.float32
    ),
    "csr_matmul_backward": lambda x, w: torch.ops.splinegpt.csr_matmul_backward(
        x.new_ones(3, 2), x.flatten(), columns(), 4, w.flatten(0, 1)
    )[0],
}


def columns() -> torch.Tensor:
    return torch.arange(4, dtype=torch.int32).repeat(3)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_forward_mode_rather_than_leave_it_out(name: str) -> None:
    operator, w = OPERATORS[name], torch.randn(4, 5, 2)
    x, dx = torch.randn(3, 4), torch.randn(3, 4)
    if name.startswith(("native", "attention")) and backends.native_build.why_not():
        pytest.skip("native cannot be built here")
    with pytest.raises(RuntimeError, match=f"splinegpt::{name} has no forward-mode derivative; KANLayer"):
        jvp(lambda x: operator(x, w), (x,), (dx,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        operator(forward_ad.make_dual(x, dx), w)


def test_all_operators_of_ours_are_among_these() -> None:
    ours = {name.removeprefix("splinegpt::") for name in torch._C._dispatch_get_all_op_names() if "splinegpt::" in name}
    others = {"triton", "triton_backward", "semi_structured_matmul"}  # on GPUs, or see test_triton.py
    assert ours - others == set(OPERATORS)


@every_impl
def test_what_is_exported_to_onnx_is_made_of_standard_operators(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(4, 3, 6, 4.0, impl)
    x = torch.randn(5, 4)
    y = layer(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = make_fx(layer)(x)
    assert all(str(node.target).startswith("aten.") for node in graph.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(graph(x), y, rtol=1e-5, atol=1e-5)


GATED = {"ffn": "gated_splines", "attention_gate": True, "token_shift": True, "kan_variant": "balanced"}


@pytest.mark.parametrize("options", [{"impl": "auto"}, {"impl": "csr"}, GATED], ids=str)
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_computes_the_same(options: dict, dynamo: bool, tmp_path: Path) -> None:
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    onnxruntime = pytest.importorskip("onnxruntime")
    model: torch.nn.Module
    if options is GATED:
        if not dynamo:
            pytest.skip("PyTorch's older exporter has no RMSNorm")
        sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 11, "block_size": 12}
        model = GPT(GPTConfig(**sizes, **options, zero_init_projections=False)).eval()
        arguments = (torch.randint(11, (2, 9)),)
    else:
        model = random_layer(5, 4, 6, 4.0, **options)
        arguments = (inputs_of_every_kind(7, 5, 6, 4.0).clamp(-40, 40),)
    torch.onnx.export(model, arguments, tmp_path / "model.onnx", dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (result, *_) = session.run(None, {session.get_inputs()[0].name: arguments[0].numpy()})
    output = model(*arguments)
    truth = output[0] if options is GATED else output
    torch.testing.assert_close(torch.from_numpy(result), truth.detach(), rtol=1e-4, atol=1e-4)
