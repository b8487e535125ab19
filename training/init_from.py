"""Starting from a trained model: a GPT-2 that the transformers package reads, an MLP run, or an exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from corpus.tokenizer import Tokenizer
from model import GPT, GPTConfig
from model_options import SPLINES
from training.checkpoint import load_checkpoint
from training.checkpoint_files import checkpoint_folder
from training.config import Config
from training.exported_model import build_options, is_exported, read_exported

USUAL_SWAP = "blocks.*.ffn.c_fc"  # the first matrix of each MLP
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner
NANOGPT_WORDS = {
    "scratch": "a run starts with a new model unless --init_from names one: leave it out",
    "resume": "a run goes on with --resume True, and with --out_dir if it is not in its usual directory",
}
# Model options that the user still chooses, besides all kan_ ones. The rest comes from the source.
CHOSEN_BY_USER = {"num_control_points", "spline_width", "dropout"}
# The activation's name in transformers → the layer's name here.
ACTIVATIONS = {"gelu_new": "mlp_tanh", "gelu_pytorch_tanh": "mlp_tanh", "gelu": "mlp"}


@dataclass(frozen=True)
class Source:
    """A trained model to start from."""

    name: str
    architecture: dict[str, Any]
    """The options of GPTConfig that define the model."""
    state: dict[str, Tensor]
    """The parameters, by their names in GPT."""
    tokenizer: Tokenizer | None
    """The tokenizer it was trained with; None if that is not recorded."""

    @property
    def has_splines(self) -> bool:
        return self.architecture["ffn"] in SPLINES or bool(self.architecture.get("kan_swap"))

    def configure(self, config: Config) -> Config:
        """Replace the configured architecture by the source's, and choose the linear layers to swap for splines.

        A source that has splines keeps them, and their grids.
        """
        if self.has_splines:
            fitted = 0.0 if config.kan_fit_grid == -1 else config.kan_fit_grid
            return dataclasses.replace(config, **self.architecture, kan_fit_grid=fitted)
        ffn = self.architecture["ffn"]
        if config.ffn not in (*SPLINES, ffn, "mlp"):
            raise UserError(
                f"{self.name} has --ffn {ffn}; give --ffn splines to swap its linear layers for splines, or --ffn mlp "
                f"to train it as it is (got {config.ffn})"
            )
        swap = config.kan_swap or (USUAL_SWAP if config.ffn in SPLINES else "")
        return dataclasses.replace(config, **self.architecture, kan_swap=swap)

    def build(self, config: GPTConfig, tokenizer: Tokenizer) -> GPT:
        """Build the model of `config` with the source's parameters. Swapped layers compute the same as before.

        UserError if the data's `tokenizer` is not the source's.
        """
        if self.tokenizer is None:
            same = tokenizer.vocab_size == self.architecture["vocab_size"]
        else:  # its model may have more rows than there are tokens
            same = tokenizer.to_metadata() == self.tokenizer.to_metadata()
        if not same:
            raise UserError(
                f"the dataset's {tokenizer.vocab_size} tokens ({tokenizer.name}) are not the "
                f"{self.architecture['vocab_size']} that {self.name} was trained on; choose another --dataset"
            )
        model = GPT(config if self.has_splines else dataclasses.replace(config, kan_swap=""))
        model.load_state_dict(self.state)
        model.config = config
        if config.kan_swap and not self.has_splines:
            model.swap_linears()
        return model


def read_source(name: str) -> Source:
    """Read the model that `--init-from` names: a run, a checkpoint file, an exported model, or a folder or name for
    transformers. UserError."""
    path = Path(name)
    if is_exported(path):
        return _from_exported(path)
    if path.suffix == ".pt" or checkpoint_folder(path).is_dir():
        return _from_run(path)
    _refuse_impossible_names(name)
    return _from_transformers(name)


def _refuse_impossible_names(name: str) -> None:
    """Raise UserError for nanoGPT's words and mistyped paths, for which transformers would search its hub for long."""
    path = Path(name)
    if name in NANOGPT_WORDS:
        raise UserError(f"--init_from {name} is nanoGPT's way to say it; here {NANOGPT_WORDS[name]}")
    is_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    is_name = name in HUB_NAMES or (len(path.parts) == 2 and not path.parent.is_dir())
    if not path.is_dir() and (is_path or not is_name):
        raise UserError(
            f"--init_from {name}: there is no such run, checkpoint or folder; give one, or a GPT-2 by its name on "
            f"transformers' hub ({', '.join(HUB_NAMES)}, or owner/name)"
        )


def _from_run(path: Path) -> Source:
    checkpoint = load_checkpoint(path, "best")
    state = checkpoint.model.state_dict()
    if checkpoint.model.spline_layers():
        raise UserError(
            f"{path} has splines already; go on with it by --out_dir {path} --resume True, start from an MLP's run, or "
            f"export it first (python export.py {path}) and start from that"
        )
    return Source(str(path), architecture_of(build_options(checkpoint.model)), state, checkpoint.tokenizer)


def _from_exported(path: Path) -> Source:
    model, tokenizer = read_exported(path)
    architecture = architecture_of(model.config)
    if model.spline_layers():
        names = ("num_control_points", "spline_width", "kan_variant", "kan_zero_centred", "kan_swap")
        architecture |= {name: getattr(model.config, name) for name in names}
    return Source(str(path), architecture, model.state_dict(), tokenizer)


def architecture_of(config: GPTConfig) -> dict[str, Any]:
    """The options that the source decides."""
    names = {field.name for field in dataclasses.fields(GPTConfig)} - CHOSEN_BY_USER
    return {name: getattr(config, name) for name in names if not name.startswith("kan_")}


def _from_transformers(name: str) -> Source:
    try:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError:
        raise UserError(
            f"--init-from {name} needs the package transformers (pip install transformers); a run of train.py does not"
        ) from None
    logging.disable_progress_bar()  # while reading the file; a download has another one
    logging.set_verbosity_error()
    try:
        theirs = GPT2LMHeadModel.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # networks, files and JSON raise many kinds
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"--init-from {name} cannot be loaded ({reason}); give a run or checkpoint of train.py, a folder saved by "
            f"transformers, or a GPT-2 on its hub, like gpt2, which needs a network the first time"
        ) from error
    config = theirs.config
    unlike = {
        "model_type": config.model_type != "gpt2",
        "activation_function": config.activation_function not in ACTIVATIONS,
        "layer_norm_epsilon": config.layer_norm_epsilon != 1e-5,
        "scale_attn_weights": not config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "add_cross_attention": config.add_cross_attention,
    }
    odd = [f"{option}={getattr(config, option)}" for option, is_odd in unlike.items() if is_odd]
    if odd:
        raise UserError(f"{name} is not a GPT-2 like OpenAI's ({', '.join(odd)}), and no other can be loaded")
    return Source(name, gpt2_architecture(config), gpt2_state(theirs.state_dict()), None)


def gpt2_architecture(config: Any) -> dict[str, Any]:
    """The options of GPTConfig for the GPT-2 of a transformers configuration."""
    return {
        **architecture_of(GPTConfig()),
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "vocab_size": config.vocab_size,
        "ffn": ACTIVATIONS[config.activation_function],
        "ffn_hidden": config.n_inner or 4 * config.n_embd,
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "tie_embeddings": config.tie_word_embeddings,
        "bias": True,
    }


def gpt2_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and transpose the parameters of a GPT2LMHeadModel. Its Conv1D layers have weights (inputs, outputs)."""
    state = {}
    for name, tensor in theirs.items():
        parts = name.removeprefix("transformer.").split(".")
        if parts[-1] in ("masked_bias", "bias") and parts[-2] == "attn":
            continue  # the causal mask, which old versions of transformers saved
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()
        state[".".join(OUR_NAMES.get(part, part) for part in parts)] = tensor.detach().float()
    return state


OUR_NAMES = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "h": "blocks",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "mlp": "ffn",
    "ln_f": "norm",
    "lm_head": "head",
}
