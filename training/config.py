"""The configuration of a run: one flat frozen dataclass, read from TOML files and the command line by one parser."""

from __future__ import annotations

import dataclasses
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
    """What training does to the splines beside its steps."""

    heading: ClassVar[str] = "splines in training"

    kan_fit_grid: float = -1.0
    """Fit each layer's spline_width before the first step, so that this share of its activations lies outside; 0: no;
    -1: 0.01 where linear layers are swapped, whose inputs may be of any size."""
    kan_smoothness: float = 0.0
    """Weight of the splines' smoothness penalty (mean squared second difference of control points) in the loss."""
    kan_refine: str = ""
    """Coarse to fine, "5@0,9@1000,17@1500": 5 control points at first, 9 after 1,000 steps …; the functions stay."""


@dataclass(frozen=True)
class DataOptions:
    """The text, the order of its batches, and where the run starts and is kept."""

    heading: ClassVar[str] = "data"

    dataset: str = "stdlib"
    """A folder under data/ (prepared on the spot if need be), or the path of any prepared folder."""
    out_dir: PathText = ""
    """Where the run is kept; by default runs/NAME-FFN, numbered if that is taken."""
    resume: bool = False
    """Go on from the newest good checkpoint in out_dir, with the run's own configuration."""
    init_from: PathText = ""
    """A trained model to start from: an MLP run or checkpoint of train.py, a folder that export.py wrote or that
    transformers saved, or a GPT-2 on its hub (gpt2). Its architecture is taken over, splines included; of a model
    without splines the linear layers are swapped for splines (kan_swap), unless --ffn mlp is given."""
    seed: int = 1337
    """Seed of initial weights, batches and dropout."""
    batch_size: int = 12
    """Sequences in one forward pass (with several processes: at most)."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step. A step sees batch_size times this many sequences in all, however many
    processes share them."""


@dataclass(frozen=True)
class OptimizationOptions:
    """The optimizer and its learning rate."""

    heading: ClassVar[str] = "optimization"

    max_iters: int = 2000
    """Optimizer steps in all."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters, or muon (orthogonalized momentum) for the matrices and splines of the blocks."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.01
    """Peak learning rate of Muon; it follows the same schedule."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine decay to min_lr, constant with a linear decay at the end of the run (wsd), or constant."""
    warmup_iters: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_iters: int = 0
    """Steps over which the learning rate decays. 0: for cosine all after the warm-up, for wsd the last 40 % of the
    run."""
    min_lr: float = -1.0
    """Learning rate at the end of the decay; -1 means a tenth of learning_rate (cosine) or 0 (wsd)."""
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
    max_skipped_steps: int = 0
    """Steps in a row that may be skipped because their loss or gradient is not finite; 0 stops training at the
    first."""


@dataclass(frozen=True)
class MachineOptions:
    """The device and how it is used."""

    heading: ClassVar[str] = "machine"

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


@dataclass(frozen=True)
class RecordOptions:
    """Evaluations, and what a run leaves behind."""

    heading: ClassVar[str] = "evaluation and records"

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
    report: Literal["off", "end", "live"] = "end"
    """When to write report.html (curves, samples, and every spline to explore): never, at the end, or also at every
    checkpoint, so that an open page follows the run."""
    sample_tokens: int = 200
    """Length of the sample written at every checkpoint; 0 for none."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also log to Weights & Biases, under the name of out_dir."""
    wandb_project: str = "splinegpt"
    """The W&B project."""


# The least value of these options; all must be finite.
LEAST: dict[str, float] = {
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
):  # fields come in reverse order: the model's first
    """Everything a run depends on. Each field is an option; its text below is the option's help."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least {least}; got {getattr(self, name)}")
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
        self.stages()

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


def _is_text(value: str) -> bool:
    """False for the stand-ins of bytes that are not UTF-8: they could not be written to the run's config.toml."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


PARSER = OptionParser(Config, USAGE, retired=RETIRED)


def parse(arguments: Sequence[str], saved: Path | None = None) -> tuple[Config, Path | None]:
    """The configuration that a command line means, and the TOML file it names (None if none).

    Later wins: defaults, the `saved` configuration of a run that is resumed, the TOML file, the options.
    Raises UserError for whatever is unknown, of the wrong type or out of range.
    """
    file = Path(expand_home(arguments[0])) if arguments and not arguments[0].startswith("-") else None
    options = arguments[1:] if file else arguments
    tokens = _tokens(renamed(_read_toml(saved), str(saved)), str(saved)) if saved else []
    tokens += _tokens(_read_toml(file), str(file)) if file else []
    return PARSER.parse([*tokens, *options]), file


def read_saved(path: Path) -> Config:
    """The configuration that a run, perhaps of an earlier version, keeps in `path`. UserError if it is damaged."""
    return parse([], saved=path)[0]


def save(config: Config, path: Path) -> None:
    """Write every field as TOML, under the headings of their groups. Raises OSError."""
    lines = []
    for group in option_groups(Config):
        lines += [
            f"# {heading_of(group)}",
            *(f"{name} = {_toml_value(getattr(config, name))}" for name in names_in(group)),
        ]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def from_dict(values: object, source: str) -> Config:
    """A configuration from a checkpoint's mapping; UserError if `source` does not hold one."""
    if isinstance(values, dict):
        values = renamed(values, source)
    if not isinstance(values, dict) or not set(values) <= set(PARSER.fields):
        raise UserError(f"{source} holds no configuration of this program; use a checkpoint that train.py wrote")
    try:
        return PARSER.parse([f"--{name}={value}" for name, value in values.items()])
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
    """Entries of a TOML file as options of a command line. UserError that names the file for an unknown one."""
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
    # JSON's strings are TOML's, but for one character that JSON need not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)
