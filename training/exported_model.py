"""An exported model: a folder with its tensors, and a JSON file with all that is needed to build, feed and read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.files import file_hash
from common.tensor_file import MalformedFile, read_tensors, write_tensors
from corpus.tokenizer import Tokenizer, tokenizer_from_metadata
from model import GPT, GPTConfig
from training.checkpoint import LoadedCheckpoint, load_checkpoint

FORMAT = "splinegpt-model-1"
DESCRIPTION_FILE = "model.json"  # not config.json, by which transformers knows folders of its own
TENSOR_FILE = "model.safetensors"
TIED = ("head.weight", "token_embedding.weight")


def load_model(path: Path, which: str = "latest") -> tuple[GPT, Tokenizer]:
    """The model of an exported folder, a run or a checkpoint, in eval mode on the CPU, and its tokenizer. UserError."""
    if is_exported(path):
        return read_exported(path)
    checkpoint = load_checkpoint(path, which)
    return checkpoint.model, checkpoint.tokenizer


def is_exported(path: Path) -> bool:
    return (path / DESCRIPTION_FILE).is_file()


def build_options(model: GPT) -> GPTConfig:
    """The options that build a model of these shapes at once: with the refined grid, and the hidden size as a number.

    Otherwise the hidden size would follow from the grid, which may have been refined since the model was built.
    """
    changes: dict[str, Any] = {"kan_impl": "auto"}
    if layers := model.spline_layers():
        changes["num_control_points"] = layers[0].num_control_points
    if (projection := getattr(model.get_submodule("blocks.0.ffn"), "c_proj", None)) is not None:
        changes["ffn_hidden"] = projection.in_features
    return dataclasses.replace(model.config, **changes)


def write_exported(checkpoint: LoadedCheckpoint, folder: Path, version: str) -> None:
    """Write the model of a checkpoint into an empty `folder`, with the program's `version`. Raises OSError."""
    state = dict(checkpoint.model.state_dict())
    if _is_tied(state):
        del state[TIED[0]]
    write_tensors(state, folder / TENSOR_FILE, {"format": "pt"})
    description = {
        "format": FORMAT,
        "version": version,
        "step": checkpoint.step,
        "sha256": file_hash(folder / TENSOR_FILE),
        "model": dataclasses.asdict(build_options(checkpoint.model)),
        "tokenizer": checkpoint.tokenizer.to_metadata(),
    }
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")


def read_exported(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model, in eval mode on the CPU, and its tokenizer. UserError where a file is missing or damaged."""
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise MalformedFile(f"{DESCRIPTION_FILE} does not describe a model in the format {FORMAT}")
        if description["sha256"] != file_hash(folder / TENSOR_FILE):
            raise MalformedFile(f"{TENSOR_FILE} is not the file that {DESCRIPTION_FILE} was written with")
        state = read_tensors(folder / TENSOR_FILE)
        model = GPT(GPTConfig(**description["model"]))
        tokenizer = tokenizer_from_metadata(description["tokenizer"])
        if tokenizer.vocab_size > model.config.vocab_size:
            raise MalformedFile(f"its vocabulary of {tokenizer.vocab_size} does not fit its model")
        if _is_tied(model.state_dict()):
            state.setdefault(TIED[0], state[TIED[1]])
        model.load_state_dict(state)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror or error}); {ADVICE}") from error
    except (MalformedFile, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder} is damaged or not an exported model ({reason}); {ADVICE}") from error
    return model.eval(), tokenizer


ADVICE = "export it again, with python export.py RUN"


def _is_tied(state: dict[str, Tensor]) -> bool:
    """Whether the head has the token embedding's weights, which are then written once."""
    head, embedding = (state.get(name) for name in TIED)
    return head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr()
