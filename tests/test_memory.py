"""Freed memory is kept: a step finds its pages where the step before left them."""

import platform
import subprocess
import sys

import pytest

from tests.runs import ROOT

SCRIPT = """
import resource, sys
import common.threads
import torch
from training.config import Config
from training.device import choose_device

if sys.argv[1] == "kept":
    choose_device(Config(device="cpu"))

def step():
    tensors = [torch.ones(2**20) for _ in range(12)]  # 4 MiB each

step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 12 * 1024


def faults(way: str) -> int:
    """Pages that a step asks for, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_a_step_asks_for_no_memory_that_the_step_before_had() -> None:
    assert faults("kept") < 0.05 * PAGES
    # How many tensors the C library gives back by itself depends on where they lie: from one to all of them.
    assert faults("as usual") > 0.05 * PAGES, "this test would not notice"
