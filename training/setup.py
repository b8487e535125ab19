"""The data and the model that a run starts with, checked and the same on all processes."""

from __future__ import annotations

import backends
from common.errors import UserError
from corpus.dataset import Dataset, ensure_prepared, find_dataset
from model import GPT
from model_options import SPLINES
from training.device import Device
from training.distributed import World
from training.evaluation import EVALUATION_TOKENS
from training.parallel import check_shardable
from training.run import Run
from training.spline_training import SplineTraining


def build_model(run: Run, dataset: Dataset, device: Device, world: World) -> tuple[GPT, SplineTraining]:
    """The run's model, and what trains its splines. Parameters are new ones, or those of the run's source.

    Grids are those of the run's step, so that a checkpoint's parameters fit. The model is on its device, or with fsdp
    on the CPU, from where it is sharded. UserError if the vocabulary or the chosen backend does not fit.
    """
    config, tokenizer = run.config, dataset.tokenizer
    if config.fsdp:
        check_shardable(device, world)
    if run.source is None and 0 < config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {config.vocab_size} is below the {tokenizer.vocab_size} of {config.dataset}; use 0 or more"
        )
    model_config = config.model_config(tokenizer.vocab_size)
    try:
        if config.ffn in SPLINES:
            width, tokens = config.n_embd, max(config.batch_size * config.block_size, EVALUATION_TOKENS)
            for stage in config.stages:
                problem = backends.Problem(width, stage.points, width, device.device, tokens)
                backends.choose(config.kan_impl, problem)
        model = run.source.build(model_config, tokenizer) if run.source is not None else GPT(model_config)
        model = model if config.fsdp else model.to(device.device)
        splines = SplineTraining(model, config)
        if run.state is None:
            splines.begin(dataset.tokens("train"))
        splines.refine(run.state["step"] if run.state else 0)
        return model, splines
    except ValueError as error:
        raise UserError(str(error)) from error


def open_together(name: str, world: World) -> Dataset:
    """Open the dataset on every process. The main process prepares it if needed; one per machine verifies it.

    All processes raise UserError for whatever `Dataset.open` refuses, and if machines have different data.
    """
    with world.together():
        folder = ensure_prepared(name) if world.is_main else None
    with world.together():
        folder = folder or find_dataset(name)
        dataset = Dataset.open(folder, verify=world.local_rank == 0)
    if len(set(world.gather(dataset.fingerprint))) > 1:
        raise UserError(f"{folder} is not the same data on all machines; copy it from the first to the others")
    return dataset
