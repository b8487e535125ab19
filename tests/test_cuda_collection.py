"""What `pytest -m cuda` would run on a machine with a GPU, collected where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A process of its own, as what the imitated GPU makes modules decide must not be seen by other tests.
COLLECT = """
import json, sys
import pytest, torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
import backends
from tests.conftest import why_skipped

class Collected:
    def pytest_collection_finish(self, session):
        self.items = session.items

collected = Collected()
pytest.main(["--collect-only", "-qq", "-m", "cuda", "-p", "no:cacheprovider", "tests"], plugins=[collected])
runs = []
for item in collected.items:
    if why_skipped(item) is None:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        reason = None
        if "impl" in params and params.get("device") == "cuda":
            problem = backends.Problem(16, 5, 16, torch.device("cuda"))
            name = backends.ALIASES.get(params["impl"], params["impl"])
            reason = None if name == "auto" else backends.BACKENDS[name].why_not(problem)
        runs.append((item.nodeid, params.get("impl"), reason))
json.dump(runs, sys.stderr)
"""


@pytest.fixture(scope="module")
def runs() -> list[tuple[str, str | None, str | None]]:
    """The test, the backend it asks for and why that cannot run on a GPU, of all that is not skipped."""
    command = [sys.executable, "-c", COLLECT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return json.loads(result.stderr.splitlines()[-1])


def test_no_test_asks_a_gpu_for_a_backend_that_cannot_run_there(runs: list) -> None:
    assert [(test, reason) for test, _, reason in runs if reason is not None] == []


def test_every_backend_of_gpus_is_asked_for(runs: list) -> None:
    asked = {impl for _, impl, _ in runs}
    assert {"reference", "embedding_bag", "embedding", "csr", "dense", "semi_structured", "triton"} <= asked
    assert len(runs) > 200
