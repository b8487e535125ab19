"""Take the model of a run away: `python export.py OUT_DIR` writes safetensors and JSON; with --onnx True ONNX too."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common.threads  # noqa: F401  before torch

import torch
import tyro
from torch import Tensor, nn

from common.command_line import OptionParser, command
from common.errors import UserError, exit_on_user_error
from common.output import output_may_fail
from common.termination import unwinding
from model import GPT
from training.checkpoint import load_checkpoint
from training.exported_model import write_exported
from training.recorded_splines import run_directory

USAGE = "python export.py OUT_DIR [--output DIR] [--onnx True] [--key value …]"
ONNX_FILE = "model.onnx"
MAX_ONNX_BYTES = 2**31 - 2**24  # of parameters in the file itself, which protobuf limits to 2 GiB


@dataclass(frozen=True)
class Options:
    out_dir: tyro.conf.Positional[Path]
    """The run's directory, or one of its checkpoints."""
    step: str = "best"
    """Which checkpoint: best, latest or a step."""
    output: Path | None = None
    """The folder to write; by default OUT_DIR-exported. It holds model.safetensors and model.json."""
    onnx: bool = False
    """Write model.onnx too: tokens (batch, time) → logits (batch, time, vocab_size). Needs pip install -e ".[onnx]"."""


@output_may_fail()
@exit_on_user_error
def main() -> None:
    options = OptionParser(Options, USAGE, positional="out_dir").parse(sys.argv[1:])
    checkpoint = load_checkpoint(options.out_dir, options.step)
    output = options.output or Path(f"{run_directory(options.out_dir)}-exported")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; delete it, or choose another --output")
    if options.onnx:
        check_onnx()
    with unwinding(), made_whole(output) as folder:
        write_exported(checkpoint, folder, program_version())
        if options.onnx:
            write_onnx(checkpoint.model, folder / ONNX_FILE)
            difference = onnx_difference(checkpoint.model, folder / ONNX_FILE)
            print(f"{ONNX_FILE}: onnxruntime's logits differ from PyTorch's by at most {difference:.1e}")
    print(f"written: {output} (step {checkpoint.step})")
    print(f"  {command('sample.py', str(output))}")


@contextlib.contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when all is well and is deleted when it is not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's folders are the user's alone
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def program_version() -> str:
    try:
        return importlib.metadata.version("splinegpt")
    except importlib.metadata.PackageNotFoundError:  # a clone that was never installed
        return "unknown"


class Logits(nn.Module):
    """A GPT that returns its logits alone."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) → (B, T, vocab_size)."""
        logits, _ = self.model(tokens)
        return logits


def check_onnx() -> None:
    """UserError that names the packages that are missing."""
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f'--onnx needs the packages {", ".join(missing)}; run pip install -e ".[onnx]"')


def write_onnx(model: GPT, path: Path) -> None:
    """Write the model in standard operators, for any number of texts and up to block_size tokens."""
    example = torch.zeros(2, max(1, min(model.config.block_size, 3)), dtype=torch.int64)
    dimensions = {0: torch.export.Dim("batch", min=1)}
    if model.config.block_size > 1:
        dimensions[1] = torch.export.Dim("time", min=1, max=model.config.block_size)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # about deprecated names inside of PyTorch
        torch.onnx.export(
            Logits(model).eval(),
            (example,),
            path,
            dynamo=True,
            verbose=False,
            input_names=["tokens"],
            output_names=["logits"],
            dynamic_shapes={"tokens": dimensions},
            external_data=size > MAX_ONNX_BYTES,
        )


@torch.no_grad()
def onnx_difference(model: GPT, path: Path) -> float:
    """The largest difference between the logits of onnxruntime and PyTorch, on random tokens of several shapes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in ((1, 1), (3, max(1, model.config.block_size // 2)), (1, model.config.block_size)):
        tokens = torch.randint(model.config.vocab_size, shape, generator=random)
        (found,) = session.run(None, {"tokens": tokens.numpy()})
        largest = max(largest, (torch.from_numpy(found) - model(tokens)[0]).abs().max().item())
    return largest


if __name__ == "__main__":
    main()
