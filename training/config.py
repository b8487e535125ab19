"""The configuration of a run: one flat frozen dataclass, read from TOML files and the command line by one parser."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kan_layer import check_middle
from model import GPTConfig
from training.errors import UserError
from training.files import expand_home
from training.options import OptionParser, PathText
from training.refinement import Stage, parse_stages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

USAGE = "python train.py [configs/NAME.toml] [--key value …]"


@dataclass(frozen=True)
class Config(GPTConfig):
    """Everything a run depends on. Each field is an option; its text below is the option's help."""

    dataset: str = "stdlib"
    """A folder under data/ (prepared on the spot if need be), or the path of any prepared folder."""
    verify_data: bool = True
    """Compare the data with its SHA-256 before training (1-2 GB a second)."""
    out_dir: PathText = ""
    """Where the run is kept; by default runs/NAME-FFN, numbered if that is taken."""
    resume: bool = False
    """Go on from the newest good checkpoint in out_dir, with the run's own configuration."""
    seed: int = 1337
    """Seed of initial weights, batches and dropout."""

    batch_size: int = 12
    """Sequences in one forward pass; of several processes' passes, at most."""
    gradient_accumulation_steps: int = 1
    """Forward passes whose gradients make one step; the step sees batch_size times this many sequences, which several
    processes share, so that a run is the same on any number of them."""
    max_iters: int = 2000
    """Optimizer steps in all."""

    init_from: PathText = ""
    """A trained model to start from: an MLP run or checkpoint of train.py, a folder saved by transformers, or a GPT-2
    on its hub (gpt2). Its architecture is taken over; linear layers are swapped for splines (kan_swap) but with
    --ffn mlp."""
    kan_fit_grid: float = -1.0
    """Fit each layer's spline_width before the first step, to leave this share of its activations outside; 0: no;
    -1: 0.01 where linear layers are swapped, whose inputs may be of any size."""
    kan_smoothness: float = 0.0
    """Weight of the splines' smoothness penalty (mean squared second difference of control points) in the loss."""
    kan_refine: str = ""
    """Coarse to fine, "5@0,9@1000,17@1500": 5 control points at first, 9 after 1,000 steps …; the functions stay."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters, or muon (orthogonalized momentum) for the matrices and splines of the blocks."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.01
    """Peak learning rate of Muon; it follows the same schedule."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine decay to min_lr, constant with a linear cooldown at the end (wsd), or constant."""
    warmup_iters: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: int = 0
    """Step at which the decay ends; 0 means max_iters."""
    min_lr: float = -1.0
    """Learning rate at the end of the decay; -1 means a tenth of learning_rate (cosine) or 0 (wsd)."""
    cooldown_iters: int = 0
    """Steps of the linear cooldown of schedule wsd; 0 means 40 % of the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices and splines (not on norms and biases)."""
    muon_weight_decay: float = 0.0
    """Decoupled weight decay on what Muon trains."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: the best there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products (master weights stay float32); auto: bfloat16 on GPUs that have it."""
    compile: Literal["auto"] | bool = "auto"
    """Use torch.compile; auto does where it pays. Where it fails, training goes on without it."""
    num_threads: int = 0
    """CPU threads; 0: one for each core, or as many as the quota of a container allows."""
    fsdp: bool = False
    """With torchrun: shard parameters, gradients and moments over the processes (FSDP2) instead of replicating them."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite: stop before the step, or skip it."""
    max_skipped_steps: int = 10
    """Stop after more steps in a row than this that on_nonfinite skipped."""

    eval_interval: int = 250
    """Steps between evaluations, each followed by a checkpoint, a record of the splines and a sample."""
    eval_iters: int = 200
    """Batches per evaluation, evenly spaced over the validation split; 0 means the whole split."""
    log_interval: int = 50
    """Steps between progress lines."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, besides the best."""
    splines: bool = True
    """Record the splines at every checkpoint, and draw them at the end."""
    report: bool = True
    """Write report.html at the end: curves, samples, and every spline to explore."""
    live: bool = False
    """Write it at every checkpoint too; an open page follows."""
    sample_tokens: int = 200
    """Length of the sample written at every checkpoint; 0 for none."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also log to Weights & Biases."""
    wandb_project: str = "splinegpt"
    """The W&B project."""
    wandb_run_name: str = ""
    """The W&B run's name; by default the name of out_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval")
        _at_least(self, 1, "keep_checkpoints")
        _at_least(self, 0, "max_skipped_steps")
        _at_least(self, 0, "max_iters", "seed", "warmup_iters", "lr_decay_iters", "cooldown_iters", "weight_decay")
        _at_least(self, 0, "muon_weight_decay", "grad_clip", "num_threads", "eval_iters", "sample_tokens")
        for name in ("weight_decay", "muon_weight_decay", "grad_clip"):
            if not getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}")
        if not 0 <= self.kan_smoothness < float("inf"):
            raise ValueError(f"kan_smoothness must be finite and at least 0; got {self.kan_smoothness}")
        if self.kan_fit_grid != -1 and not 0 <= self.kan_fit_grid < 1:
            raise ValueError(f"kan_fit_grid must be a share, at least 0 and below 1, or -1; got {self.kan_fit_grid}")
        self.stages()
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63; got {self.seed}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0; got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon; got {self.optimizer!r}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be stop or skip; got {self.on_nonfinite!r}")
        if self.fsdp and (self.kan_refine or self.kan_smoothness):
            raise ValueError("kan_refine and kan_smoothness need whole parameters; leave them or --fsdp out")
        for name in ("dataset", "out_dir", "wandb_project", "wandb_run_name", "device", "init_from"):
            if not _is_text(getattr(self, name)):
                raise ValueError(f"{name} must be UTF-8 text; got {getattr(self, name)!r}, give another --{name}")
        if self.min_lr != -1 and not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr must be from 0 to learning_rate, or -1 for a default; got {self.min_lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")

    @property
    def fitted_share_outside(self) -> float:
        """Of activations, when the grids are fitted; 0 where they are not."""
        return (0.01 if self.kan_swap else 0.0) if self.kan_fit_grid == -1 else self.kan_fit_grid

    def stages(self) -> tuple[Stage, ...]:
        """The splines' grids, and after how many steps each begins. ValueError if kan_refine is not well formed."""
        stages = parse_stages(self.kan_refine, self.num_control_points)
        for stage in stages[1:]:
            check_middle("kan_zero_centred", self.kan_zero_centred, stage.points, self.kan_variant)
        return stages

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The part that defines the model, with the dataset's vocabulary filled in."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)}
        return GPTConfig(**{**values, "vocab_size": self.vocab_size or vocab_size})


def _at_least(config: Config, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(config, name)}")


def _is_text(value: str) -> bool:
    """False for the stand-ins of bytes that are not UTF-8: they could not be written to the run's config.toml."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


PARSER = OptionParser(Config, USAGE)


def parse(arguments: Sequence[str], saved: Path | None = None) -> tuple[Config, Path | None]:
    """The configuration that a command line means, and the TOML file it names (None if none).

    Later wins: defaults, the `saved` configuration of a run that is resumed, the TOML file, the options.
    Raises UserError for whatever is unknown, of the wrong type or out of range.
    """
    file = Path(expand_home(arguments[0])) if arguments and not arguments[0].startswith("-") else None
    options = arguments[1:] if file else arguments
    tokens = [token for source in (saved, file) if source for token in _toml_tokens(source)]
    return PARSER.parse([*tokens, *options]), file


def save(config: Config, path: Path) -> None:
    """Write every field as TOML. Raises OSError."""
    values = dataclasses.asdict(config)
    path.write_text("".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items()), encoding="utf-8")


def from_dict(values: object, source: str) -> Config:
    """A configuration from a checkpoint's mapping; UserError if `source` does not hold one."""
    if not isinstance(values, dict) or not set(values) <= set(PARSER.fields):
        raise UserError(f"{source} holds no configuration of this program; use a checkpoint that train.py wrote")
    try:
        return PARSER.parse([f"--{name}={value}" for name, value in values.items()])
    except UserError as error:
        raise UserError(f"{source} holds a damaged configuration: {error}") from error


def _toml_tokens(path: Path) -> list[str]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(str(file) for file in Path("configs").glob("*.toml"))) or "a TOML file"
        raise UserError(f"there is no config file {path}; use {there}, or options alone: {USAGE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a config file ({error}); use a TOML file") from error
    except (ValueError, RecursionError) as error:  # ValueError: TOML's own errors, and numbers beyond all bounds
        raise UserError(f"{path} is not valid TOML ({error}); write one `key = value` a line") from error
    for name, value in entries.items():
        if isinstance(value, dict | list):
            raise UserError(f"{path}: {name} must be a single value, not a table or list; write `{name} = value`")
        try:
            PARSER.known(name)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return [f"--{name}={value}" for name, value in entries.items()]


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's strings are TOML's, but for one character that JSON need not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)
