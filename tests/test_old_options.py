"""Options of earlier versions: one sentence says what to write now, and runs trained with them still load."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import report
import sample
import train
from common.errors import UserError
from tests.runs import assert_one_sentence, call, make_dataset, options, resume_options, train_losses, train_until
from training.checkpoint import list_steps, read_state
from training.config import Config, parse, read_saved
from training.old_options import RETIRED
from training.sealed_file import write_sealed

# The configuration of a run by the version before, as its config.toml and checkpoints have it.
BEFORE = {
    "verify_data": True,
    "lr_decay_iters": 0,
    "cooldown_iters": 0,
    "ffn_match": False,
    "live": False,
    "on_nonfinite": "stop",
    "max_skipped_steps": 10,
    "wandb_run_name": "",
    "report": "off",
}
NEW = ("architecture", "decay_iters")


def old_values(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in NEW}
    blocks = {"splines": ("kan", "plain"), "gated_splines": ("kan", "gated")}
    ffn, block = blocks.get(config["ffn"], (config["ffn"], "plain"))
    return {**kept, **BEFORE, "ffn": ffn, "kan_block": block, **changes}


def as_toml(values: dict[str, Any]) -> str:
    lines = [
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for name, value in values.items()
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("retired", RETIRED)
def test_a_retired_option_gets_a_sentence_that_says_what_to_write(tmp_path: Path, retired: str) -> None:
    name, _, value = retired.partition("=")
    assert_one_sentence(call(train.main, f"--{name}={value or 1}"), name, RETIRED[retired])
    (tmp_path / "my.toml").write_text(f"{name} = {value or 1}" if value != "kan" else 'ffn = "kan"')
    assert_one_sentence(call(train.main, tmp_path / "my.toml"), "my.toml", name, RETIRED[retired])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"ffn": "splines"}, {"ffn": "splines"}),
        ({"ffn": "splines", "kan_block": "gated"}, {"ffn": "gated_splines"}),
        ({"ffn": "mlp", "kan_block": "gated"}, {"ffn": "mlp"}),
        ({"report": "off", "live": True}, {"report": "off"}),
        ({"report": True, "live": True}, {"report": "live"}),
        ({"report": True, "live": False}, {"report": "end"}),
        ({"on_nonfinite": "stop", "max_skipped_steps": 10}, {"max_skipped_steps": 0}),
        ({"on_nonfinite": "skip", "max_skipped_steps": 10}, {"max_skipped_steps": 10}),
        ({"schedule": "wsd", "cooldown_iters": 30}, {"decay_iters": 30}),
        ({"schedule": "cosine", "lr_decay_iters": 300, "warmup_iters": 100}, {"decay_iters": 200}),
        ({"ffn": "mlp", "ffn_match": True, "num_control_points": 5, "n_embd": 32}, {"ffn_hidden": 80}),
        ({"ffn": "swiglu", "ffn_match": True, "num_control_points": 9, "n_embd": 32}, {"ffn_hidden": 96}),
    ],
    ids=str,
)
def test_the_configuration_of_an_old_run_means_what_it_meant(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
    (tmp_path / "config.toml").write_text(as_toml(old))
    found = read_saved(tmp_path / "config.toml")
    assert {name: getattr(found, name) for name in new} == new


@pytest.mark.parametrize("text", ["lr_decay_iters = 'many'", "ffn = 'mlp'\nffn_match = true", "n_layer = 'two'"])
def test_a_damaged_old_configuration_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UserError):
        parse([], saved=tmp_path / "config.toml")


@pytest.mark.parametrize("ffn", ["splines", "gated_splines", "mlp"])
def test_an_old_run_resumes_bit_for_bit_samples_and_reports(tmp_path: Path, ffn: str) -> None:
    dataset = make_dataset(tmp_path / "words")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_until(options(dataset, whole, ffn=ffn, splines=True))
    train_until(options(dataset, run, ffn=ffn, splines=True), 4)
    config = read_saved(run / "config.toml")
    (run / "config.toml").write_text(as_toml(old_values(dataclasses.asdict(config))))
    for path in list_steps(run):
        state = read_state(path)
        write_sealed({**state, "config": old_values(state["config"])}, path)
    resumed = call(train.main, *resume_options(run))
    assert resumed.code == 0 and "was written by an earlier version" in resumed.err + resumed.out
    assert train_losses(run) == train_losses(whole)
    assert call(sample.main, run, "--max_new_tokens", 5).code == 0
    assert call(report.main, run).code == 0


def test_defaults_need_no_translation() -> None:
    assert not {name for name in RETIRED if "=" not in name} & {field.name for field in dataclasses.fields(Config)}
