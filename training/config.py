"""The configuration of a run: a flat frozen dataclass, read from TOML files and the command line by one parser."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.command_line import OptionParser, PathText, heading_of, names_in, option_groups
from common.errors import UserError
from common.files import expand_home
from model import GPTConfig
from splines.checks import check_middle
from training.old_options import RETIRED, renamed
from training.refinement import Stage, parse_stages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

USAGE = "python train.py [configs/NAME.toml] [--key value …]"


@dataclass(frozen=True)
class SplineTrainingOptions:
    """Training of splines beyond optimizer steps."""

    heading: ClassVar[str] = "splines in training"

    kan_fit_grid: float = -1.0
    """Fit each layer's spline_width before the first step, so that this share of its activations lies outside the grid.
    0: do not fit; -1: 0.01 if linear layers are swapped for splines (their inputs may be of any size), else 0."""
    kan_smoothness: float = 0.0
    """Weight of the splines' smoothness penalty (mean squared second difference of control points) in the loss."""
    kan_refine: str = ""
    """Train coarse to fine: "5@0,9@1000,17@1500" means 5 control points at first, 9 after 1,000 steps, 17 after 1,500.
    Refining a grid does not change the functions."""


@dataclass(frozen=True)
class DataOptions:
    """The text, its batches, and where the run starts and is kept."""

    heading: ClassVar[str] = "data"

    dataset: str = "stdlib"
    """A folder under data/, which is prepared if it is not yet, or the path of any prepared folder."""
    out_dir: PathText = ""
    """The run's directory; by default runs/NAME-FFN, with a number if that exists."""
    resume: bool = False
    """Go on from the newest undamaged checkpoint in out_dir, with the configuration that is saved there."""
    init_from: PathText = ""
    """A trained model to start from: an MLP run or checkpoint of train.py, a folder that export.py wrote or that
    transformers saved, or the name of a GPT-2 on its hub (gpt2). Its architecture replaces the configured one, splines
    included. The linear layers of a model without splines are swapped for splines (kan_swap), unless --ffn mlp is
    given."""
    seed: int = 1337
    """Seed of the initial weights, the batches and dropout."""
    batch_size: int = 12
    """Sequences in a micro-batch, which is one forward pass (with several processes: at most that many)."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step. A step sees batch_size times this many sequences in all, however many
    processes share them."""


@dataclass(frozen=True)
class OptimizationOptions:
    """The optimizer and its learning rate."""

    heading: ClassVar[str] = "optimization"

    max_iters: int = 2000
    """Number of optimizer steps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters; or muon (orthogonalized momentum) for the matrices and splines of the blocks, and adamw
    for the rest."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.01
    """Peak learning rate of Muon; it follows the same schedule."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine decay to min_lr, constant with a linear decay at the end of the run (wsd), or constant."""
    warmup_iters: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_iters: int = 0
    """Steps over which the learning rate decays. 0: all steps after the warm-up (cosine), or the last 40 % of the run
    (wsd)."""
    min_lr: float = -1.0
    """Learning rate at the end of the decay; -1 means a tenth of learning_rate (cosine) or 0 (wsd)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices and splines (not on norms and biases)."""
    muon_weight_decay: float = 0.0
    """Decoupled weight decay on the parameters that Muon trains."""
    beta1: float = 0.9
    """AdamW's decay rate for the mean of gradients."""
    beta2: float = 0.99
    """AdamW's decay rate for the mean of squared gradients."""
    grad_clip: float = 1.0
    """Clip the gradient to this norm; 0: do not clip."""
    max_skipped_steps: int = 0
    """Limit of steps in a row that are skipped because their loss or gradient is not finite. 0: the first such step
    ends training."""


@dataclass(frozen=True)
class MachineOptions:
    """The device, and how it is used."""

    heading: ClassVar[str] = "machine"

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; or auto: cuda if there is one, else mps, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products (master weights stay float32). auto: bfloat16 on GPUs that have it, else float16
    on GPUs and float32 elsewhere."""
    compile: Literal["auto"] | bool = "auto"
    """Use torch.compile. auto: if it saves time. If compiling fails, training goes on without it."""
    num_threads: int = 0
    """CPU threads. 0: one for each core, or as many as a container's CPU quota allows."""
    fsdp: bool = False
    """Shard parameters, gradients and moments over the processes of torchrun (FSDP2); else they are replicated."""


@dataclass(frozen=True)
class RecordOptions:
    """Evaluations, and the files that a run writes."""

    heading: ClassVar[str] = "evaluation and records"

    eval_interval: int = 250
    """Steps between evaluations, each followed by a checkpoint, a record of the splines and a sample."""
    eval_iters: int = 200
    """Batches per evaluation, evenly spaced over the validation split; 0 means the whole split."""
    log_interval: int = 50
    """Steps between progress lines."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints to keep. The best is kept too."""
    splines: bool = True
    """Record the splines at every evaluation, and draw them at the end."""
    report: Literal["off", "end", "live"] = "end"
    """When to write report.html (curves, samples, and every spline to explore): never, at the end, or also at every
    checkpoint, so that an open page follows the run."""
    sample_tokens: int = 200
    """Length of the sample written at every checkpoint; 0 for none."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also log to Weights & Biases, under the name of out_dir."""
    wandb_project: str = "splinegpt"
    """The W&B project."""


# The smallest value of these options; all must be finite.
MINIMUM: dict[str, float] = {
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_interval": 1,
    "log_interval": 1,
    "keep_checkpoints": 1,
    "max_iters": 0,
    "seed": 0,
    "warmup_iters": 0,
    "decay_iters": 0,
    "max_skipped_steps": 0,
    "num_threads": 0,
    "eval_iters": 0,
    "sample_tokens": 0,
    "weight_decay": 0,
    "muon_weight_decay": 0,
    "grad_clip": 0,
    "kan_smoothness": 0,
}


@dataclass(frozen=True)
class Config(
    RecordOptions, MachineOptions, OptimizationOptions, DataOptions, SplineTrainingOptions, GPTConfig
):  # fields come from the last base first
    """All options of a run. The text below a field is the help of its option.

    The values here replace the plain ones of the groups. They make the best model that two CPU cores train in two
    minutes on the standard library of Python (docs/benchmarks.md).
    """

    n_layer: int = 2
    block_size: int = 256
    ffn: str = "gated_splines"
    ffn_norm: bool = True
    token_shift: bool = True
    pair_rows: int = 8192
    kan_zero_centred: bool = True
    batch_size: int = 6
    max_iters: int = 1600
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = 8e-3
    muon_weight_decay: float = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    warmup_iters: int = 20
    decay_iters: int = 1200
    eval_interval: int = 320

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in MINIMUM.items():
            if not minimum <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least {minimum}; got {getattr(self, name)}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not _is_text(value):
                raise ValueError(f"{field.name} must be UTF-8 text; got {value!r}, give another --{field.name}")
        if self.kan_fit_grid != -1 and not 0 <= self.kan_fit_grid < 1:
            raise ValueError(f"kan_fit_grid must be a share, at least 0 and below 1, or -1; got {self.kan_fit_grid}")
        if self.min_lr != -1 and not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr must be from 0 to learning_rate, or -1 for a default; got {self.min_lr}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63; got {self.seed}")
        if self.fsdp and (self.kan_refine or self.kan_smoothness):
            raise ValueError("kan_refine and kan_smoothness need whole parameters; leave them or --fsdp out")
        _ = self.stages  # raises ValueError

    @property
    def fitted_share_outside(self) -> float:
        """The share of activations that lies outside after fitting the grids; 0 if they are not fitted."""
        return (0.01 if self.kan_swap else 0.0) if self.kan_fit_grid == -1 else self.kan_fit_grid

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The splines' grids, and the step at which each begins. ValueError if kan_refine is malformed."""
        stages = parse_stages(self.kan_refine, self.num_control_points)
        for stage in stages[1:]:
            check_middle("kan_zero_centred", self.kan_zero_centred, stage.points, self.kan_variant)
        return stages

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The options that define the model, with the dataset's vocabulary size filled in."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)}
        return GPTConfig(**{**values, "vocab_size": self.vocab_size or vocab_size})


def _is_text(value: str) -> bool:
    """Whether it can be written to the run's config.toml. Surrogates, Python's stand-ins for invalid UTF-8, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


PARSER = OptionParser(Config, USAGE, retired=RETIRED)


def parse(arguments: Sequence[str], saved: Path | None = None) -> tuple[Config, Path | None]:
    """Parse a command line. Returns the configuration, and the TOML file it names (None if none).

    Of the defaults, the `saved` configuration of a resumed run, the TOML file and the options, later ones win.
    UserError for an option that is unknown, of the wrong type or out of range.
    """
    file = Path(expand_home(arguments[0])) if arguments and not arguments[0].startswith("-") else None
    options = arguments[1:] if file else arguments
    tokens = _tokens({**plain_defaults(), **renamed(_read_toml(saved), str(saved))}, str(saved)) if saved else []
    tokens += _tokens(_read_toml(file), str(file)) if file else []
    return PARSER.parse([*tokens, *options]), file


def plain_defaults() -> dict[str, Any]:
    """The values of all options before `Config` replaces some. A saved run without an option had its plain value."""
    return {name: getattr(group, name) for group in option_groups(Config) for name in names_in(group)}


def read_saved(path: Path) -> Config:
    """Read the configuration that a run, perhaps of an earlier version, saved. UserError if it is damaged."""
    return parse([], saved=path)[0]


def save(config: Config, path: Path) -> None:
    """Write every option as TOML, under the headings of the groups. Raises OSError."""
    lines = []
    for group in option_groups(Config):
        lines += [
            f"# {heading_of(group)}",
            *(f"{name} = {_toml_value(getattr(config, name))}" for name in names_in(group)),
        ]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def from_dict(values: object, source: str) -> Config:
    """Make a configuration from a checkpoint's mapping. UserError, naming `source`, if it is not one."""
    if isinstance(values, dict):
        values = renamed(values, source)
    if not isinstance(values, dict) or not set(values) <= set(PARSER.fields):
        raise UserError(f"{source} holds no configuration of this program; use a checkpoint that train.py wrote")
    try:
        return PARSER.parse([f"--{name}={value}" for name, value in {**plain_defaults(), **values}.items()])
    except UserError as error:
        raise UserError(f"{source} holds a damaged configuration: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(str(file) for file in Path("configs").glob("*.toml"))) or "a TOML file"
        raise UserError(f"there is no config file {path}; use {there}, or options alone: {USAGE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a config file ({error}); use a TOML file") from error
    except (ValueError, RecursionError) as error:  # ValueError: TOML's own errors, and numbers beyond all bounds
        raise UserError(f"{path} is not valid TOML ({error}); write one `key = value` a line") from error


def _tokens(entries: Mapping[str, Any], source: str) -> list[str]:
    """Turn entries of a TOML file into options of a command line. UserError, naming the file, for an unknown one."""
    for name, value in entries.items():
        if isinstance(value, dict | list):
            raise UserError(f"{source}: {name} must be a single value, not a table or list; write `{name} = value`")
        try:
            PARSER.known(name, str(value))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    return [f"--{name}={value}" for name, value in entries.items()]


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # JSON strings are TOML strings, except for one character that only TOML requires to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)
