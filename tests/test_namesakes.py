"""A user's module with the name of one of ours never replaces it unnoticed, nor the other way round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, run_command
from training.config import tomllib

NAMES = sorted({path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")})
TAKEN = "raise SystemExit('taken')\n"

# For each name, somebody's script uses the layer from the clone, with a module of that name beside the script. Each
# script is a process, forked from one that has loaded PyTorch.
USE_THE_LAYER = """
import json, os, sys
import matplotlib.collections, matplotlib.figure, matplotlib.font_manager, matplotlib.style, torch
for name, folder in json.loads(sys.argv[1]).items():
    if os.fork():
        os.wait()
        continue
    sys.path.insert(0, folder)
    try:
        from kan_layer import KANLayer
        layer = KANLayer(3, 2)
        layer(torch.randn(5, 3)).sum().backward()
        layer.plot()
        outcome = "works"
    except ImportError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = repr(error)
    print(json.dumps([name, outcome]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems that fork")
def test_beside_a_script_that_uses_the_layer_a_namesake_is_refused_by_its_path_or_does_no_harm(tmp_path: Path) -> None:
    folders, files = {}, {}
    for name in NAMES:
        if name == "kan_layer":
            continue
        folder = tmp_path / f"with {name}"
        files[name] = folder / (f"{name}.py" if (ROOT / f"{name}.py").exists() else f"{name}/__init__.py")
        files[name].parent.mkdir(parents=True)
        files[name].write_text(TAKEN)
        folders[name] = str(folder)
    command = [sys.executable, "-c", USE_THE_LAYER, json.dumps(folders)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    outcomes = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(outcomes) == list(folders), done.stderr
    refused = {name: outcome for name, outcome in outcomes.items() if outcome != "works"}
    for name, sentence in refused.items():
        assert str(files[name]) in sentence and str(ROOT) in sentence and "rename" in sentence, sentence
    assert "backends" in refused and not {"train", "model", "training", "tests"} & set(refused)


@pytest.mark.parametrize("script", ["train.py", "bench/options.py", "data/text/prepare.py"])
def test_commands_take_what_is_theirs_from_the_clone(tmp_path: Path, script: str) -> None:
    """Other modules of these names are on the path, like those of a project that shares the environment."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(TAKEN)
    result = run_command(script, "--help", env={"PYTHONPATH": str(tmp_path)})
    assert result.code == 0 and "usage" in result.out, result


def test_nothing_of_ours_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings == {"py-modules": [], "packages": []}, "else setuptools would look for modules itself"
