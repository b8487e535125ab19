"""Steps of `bench/gpu.py` that train in their own process: in a group of one, and under PyTorch's profiler."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.shared.gpu_runs import QUIET, TINY, Options, dataset
from bench.shared.gpu_setting import Setting
from corpus.dataset import Dataset, ensure_prepared
from model import GPT, GPTConfig
from training.device import Device, choose_device
from training.distributed import ALONE
from training.parallel import shard
from training.run import open_run


def group(setting: Setting) -> None:
    """A step by DDP and one by FSDP2, in a group of this process alone, beside one without a group."""
    device = torch.device(setting.device)
    x = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    losses = {"alone": one_step(small_gpt().to(device), x)}
    with group_of_one(setting):
        ids = [device.index or 0] if device.type == "cuda" else None
        losses["DDP"] = one_step(DistributedDataParallel(small_gpt().to(device), device_ids=ids), x)
        model = small_gpt()
        shard(model, Device(device, torch.float32, False, "a check"), ALONE)
        losses["FSDP2"] = one_step(model, x)
    setting.keep(losses=losses, backend="gloo" if setting.rehearse else "nccl", summary="DDP and FSDP2 as without")
    spread = (max(each) - min(each) for each in zip(*losses.values(), strict=True))
    before, after = losses["alone"]
    if not (max(spread) < 1e-3 and after < before):
        raise RuntimeError(f"the losses before and after a step should fall, and be the same three times: {losses}")


@contextlib.contextmanager
def group_of_one(setting: Setting) -> Iterator[None]:
    store = torch.distributed.HashStore()
    more: Options = {} if setting.rehearse else {"device_id": torch.device("cuda", torch.cuda.current_device())}
    backend = "gloo" if setting.rehearse else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, **more)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=32, block_size=16, num_control_points=5))


def one_step(model: nn.Module, x: torch.Tensor) -> list[float]:
    """The losses before and after a step of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        loss = model(x, x)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


# ---- profile ---------------------------------------------------------------------------------------------------------


def profile(setting: Setting) -> None:
    """Of three steps of gpt2_124m with fewer micro-batches: the GPU's share of the time, and its longest kernels."""
    from torch.profiler import ProfilerActivity

    from train import Trainer

    tiny = {**TINY, "max_iters": 8} if setting.rehearse else {"device": "cuda", "compile": True}
    fewer = {"gradient_accumulation_steps": 1 if setting.rehearse else 4}
    out_dir = setting.folder / "runs" / f"profile-{os.getpid()}"
    options = {"dataset": dataset(setting), "out_dir": out_dir, **tiny, **fewer, **QUIET}
    run = open_run(["configs/gpt2_124m.toml", *(f"--{name}={value}" for name, value in options.items())], ALONE)
    trainer = Trainer(run, Dataset.open(ensure_prepared(run.config.dataset)), choose_device(run.config))
    for _ in range(3):
        trainer.step()
    trainer.device.synchronize()
    activities = [ProfilerActivity.CPU] if setting.rehearse else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(3):
            trainer.step()
        trainer.device.synchronize()
        wall_ms = 1000 * (time.perf_counter() - start)
    kernels = longest(profiler, on_gpu=not setting.rehearse)
    busy = sum(kernel["ms"] for kernel in kernels)
    setting.keep(
        wall_ms=wall_ms, busy_ms=busy, kernels=kernels[:20], summary=f"kernels run {busy / wall_ms:.0%} of the time"
    )


def longest(profiler: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """Kernels (on a CPU operators) by the time that they took themselves, longest first."""
    of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, of) > 0]
    if on_gpu:  # an operator's event repeats the time of its kernels
        events = [event for event in events if str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -getattr(event, of))
    return [{"name": event.key[:80], "launches": event.count, "ms": getattr(event, of) / 1000} for event in events]
