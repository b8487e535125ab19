"""Taking a model away: the format is that of safetensors, and what is read back is the model, bit for bit."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export
import sample
import train
from common.tensor_file import DTYPES, MalformedFile, read_tensors, write_tensors
from kan_layer import KANLayer
from tests.runs import Result, assert_one_sentence, call, make_dataset, options, resume_options, train_until
from training.checkpoint import load_checkpoint
from training.exported_model import read_exported

BASE = {"zero_init_projections": False, "kan_init": "random_normal"}
KINDS = {
    "splines": {},
    "refined": {"ffn": "gated_splines", "num_control_points": 3, "kan_refine": "3@0,5@6", "attention_gate": True},
    "fitted": {"kan_fit_grid": 0.05, "kan_variant": "balanced", "pair_rows": 20, "token_shift": True},
    "untied": {"tie_embeddings": False, "architecture": "nanogpt", "bias": True, "kan_zero_centred": True},
    "mlp": {"ffn": "mlp", "vocab_size": 30},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def exported(run: Path, *more: str) -> Path:
    result = call(export.main, run, *more)
    assert result.code == 0 and not result.err, result
    return Path(f"{run}-exported")


def texts(folder: Path) -> str:
    result: Result = call(sample.main, folder, "--prompt", "the ", "--max_new_tokens", 40, "--num_samples", 2)
    assert result.code == 0, result
    return result.out


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_is_the_model(kind: str, dataset: Path, tmp_path: Path) -> None:
    """Parameters, logits and samples; and a run that starts from it starts with it, and can be resumed."""
    run = tmp_path / "run"
    train_until(options(dataset, run, **BASE, **KINDS[kind]))
    folder = exported(run)
    theirs, (ours, _) = load_checkpoint(run, "best").model, read_exported(folder)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokens = torch.randint(10, (3, 16))
    assert torch.equal(ours(tokens)[0], theirs(tokens)[0])
    assert texts(folder) == texts(run)
    more = {"ffn": "mlp"} if kind == "mlp" else {}
    shapeless = [option for option in options(dataset, tmp_path / "on", **more) if not option.startswith("--n_")]
    assert call(train.main, *shapeless, "--init_from", folder, "--max_iters", 0).code == 0
    began = load_checkpoint(tmp_path / "on").model
    assert torch.equal(began(tokens)[0], theirs(tokens)[0])
    assert call(train.main, *resume_options(tmp_path / "on"), "--max_iters", 2).code == 0


def test_an_exported_model_with_swapped_layers_keeps_its_splines(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_until(options(dataset, run, ffn="mlp", kan_swap="blocks.*.ffn.*", num_control_points=6))
    folder = exported(run)
    assert call(train.main, *options(dataset, tmp_path / "on", init_from=folder, max_iters=0)).code == 0
    tokens = torch.randint(10, (3, 16))
    assert torch.equal(load_checkpoint(tmp_path / "on").model(tokens)[0], load_checkpoint(run, "best").model(tokens)[0])


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99)),
    max_size=6,
)


def random_tensor(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """Any bits, NaNs of all kinds among them."""
    numbers = torch.randint(256, (*shape, DTYPES[name].itemsize), generator=torch.Generator().manual_seed(seed))
    return (numbers % 2 if name == "BOOL" else numbers).to(torch.uint8).view(DTYPES[name]).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@settings(max_examples=60)
@given(TENSORS)
def test_files_are_those_of_the_safetensors_package(tmp_path_factory, described: dict) -> None:
    package = pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: random_tensor(*description) for name, description in described.items()}
    write_tensors(tensors, folder / "ours", {"format": "pt"})
    package.save_file(tensors, folder / "theirs")
    for found in (package.load_file(folder / "ours"), read_tensors(folder / "ours"), read_tensors(folder / "theirs")):
        assert found.keys() == tensors.keys()
        assert all(bits(found[name]) == bits(tensor) for name, tensor in tensors.items())


def test_damaged_files_are_refused_as_the_package_refuses_them(tmp_path: Path) -> None:
    """A changed byte of the header, or a cut, gives an error of ours, or tensors that the package reads as well."""
    package = pytest.importorskip("safetensors.torch")
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_tensors({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.int64)}, good)
    data = good.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    rng, refused = random.Random(1), 0
    for _ in range(400):
        changed = bytearray(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        if len(changed) == len(data):
            changed[rng.randrange(size)] = rng.randrange(256)
        bad.write_bytes(changed)
        try:
            found = read_tensors(bad)
        except MalformedFile:
            refused += 1
            continue
        theirs = package.load_file(bad)
        assert found.keys() == theirs.keys() and all(bits(found[name]) == bits(theirs[name]) for name in found)
    assert refused > 200


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4),  # half a place
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8),  # a gap
        ({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, 4),  # one place for two
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, 4),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}}, 4),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 8),  # something behind it
        ([], 0),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(header: object, size: int, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(MalformedFile):
        read_tensors(tmp_path / "file")


def test_a_layer_alone_is_taken_away(tmp_path: Path) -> None:
    """Its grid, which may have been fitted, goes with its parameters."""
    layer = KANLayer(6, 5, num_control_points=4, bias=True)
    layer.fit_grid(3 * torch.randn(100, 6))
    write_tensors(layer.state_dict(), tmp_path / "layer.safetensors")
    other = KANLayer(6, 5, num_control_points=4, bias=True)
    other.load_state_dict(read_tensors(tmp_path / "layer.safetensors"))
    x = torch.randn(7, 6)
    assert other.spline_width == layer.spline_width != 4.0 and torch.equal(other(x), layer(x))


def onnxruntime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


def test_onnxruntime_computes_the_logits(dataset: Path, tmp_path: Path) -> None:
    runtime = onnxruntime()
    train_until(options(dataset, tmp_path / "run", **BASE, **KINDS["refined"], pair_rows=20))
    result = call(export.main, tmp_path / "run", "--onnx", "True")
    assert result.code == 0 and "model.onnx: onnxruntime's logits differ from PyTorch's by at most" in result.out
    session = runtime.InferenceSession(tmp_path / "run-exported/model.onnx")
    model = load_checkpoint(tmp_path / "run", "best").model
    for shape in ((1, 1), (5, 16), (2, 7)):
        tokens = torch.randint(10, shape)
        (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens)[0].detach(), rtol=1e-4, atol=1e-5)


def test_a_layer_alone_becomes_onnx_for_any_number_of_rows(tmp_path: Path) -> None:
    runtime = onnxruntime()
    layer = KANLayer(6, 5, num_control_points=4).eval()
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(layer, (torch.randn(3, 6),), tmp_path / "layer.onnx", dynamo=True, dynamic_shapes={"x": batch})
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    x = 3 * torch.randn(11, 6)
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_sentence(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train_until(options(dataset, run))
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert_one_sentence(call(export.main, run, "--onnx", "True"), "onnxscript", '".[onnx]"')
    assert not Path(f"{run}-exported").exists()
    folder = exported(run)
    assert_one_sentence(call(export.main, run), "is there already", "--output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-exported"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert_one_sentence(call(sample.main, folder), "damaged", "export it again")
    (folder / "model.json").write_text("{")
    assert_one_sentence(call(sample.main, folder), "damaged", "export it again")
    (folder / "model.safetensors").unlink()
    assert_one_sentence(call(train.main, *options(dataset, tmp_path / "on", init_from=folder)), "export it again")
