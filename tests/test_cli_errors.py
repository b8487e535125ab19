"""Every mistake of the user ends a command with one sentence that says what to do, never with a traceback."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import plot
import sample
import train
from tests.runs import assert_one_sentence, call, make_dataset, options, resume_options
from training.sealed_file import write_sealed


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A finished run with splines, which tests must not change."""
    run = tmp_path_factory.mktemp("runs") / "kan"
    assert call(train.main, *options(dataset, run)).code == 0
    return run


@pytest.fixture(scope="module")
def finished_mlp(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mlp"
    assert call(train.main, *options(dataset, run, ffn="mlp")).code == 0
    return run


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A copy of the finished run, which the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_layers": 2}, ["n_layers", "did you mean n_layer?"]),
        ({"frobnicate": 2}, ["frobnicate", "--help"]),
        ({"n_layer": "two"}, ["n_layer", "two", "int"]),
        ({"n_embd": 15}, ["n_embd=15", "n_head=2"]),
        ({"n_embd": 18, "n_head": 6}, ["even"]),
        ({"block_size": 100_000}, ["block_size 100000", "--block_size of at most"]),
        ({"block_size": 1000}, ["val", "--block_size of at most"]),
        ({"num_control_points": 1}, ["num_control_points", "2"]),
        ({"spline_width": 0}, ["spline_width"]),
        ({"spline_width": -4}, ["spline_width"]),
        ({"kan_impl": "magic"}, ["impl", "magic", "dense", "embedding_bag"]),
        ({"kan_variant": "Z-spline"}, ["variant", "Z-spline", "B-spline"]),
        ({"kan_init": "ones"}, ["kan_init", "ones", "identity"]),
        ({"vocab_size": 3}, ["vocab_size 3"]),
        ({"device": "quantum"}, ["device", "quantum"]),
        ({"dtype": "float16"}, ["float16", "bfloat16"]),
        ({"seed": 10**30}, ["seed"]),
        ({"dataset": "no_such_data"}, ["no_such_data", "stdlib", "prepare.py"]),
        ({"dataset": "/no/such/folder"}, ["/no/such/folder"]),
        ({"dataset": "x" * 5000}, ["dataset"]),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, dict) else "",
)
def test_an_impossible_option_is_refused(
    tmp_path: Path, dataset: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    assert_one_sentence(call(train.main, *options(dataset, tmp_path / "run", **changes)), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("n_layers = 2", ["n_layers", "did you mean n_layer?"]),
        ('n_layer = "two"', ["n_layer", "two"]),
        ("n_layer 2", ["TOML"]),
        ("[model]\nn_layer = 2", ["model"]),
    ],
)
def test_a_mistake_in_a_config_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "my.toml").write_text(text)
    assert_one_sentence(call(train.main, tmp_path / "my.toml"), *parts)


def test_a_missing_config_file_is_named_with_those_there_are(tmp_path: Path) -> None:
    assert_one_sentence(call(train.main, tmp_path / "none.toml"), "none.toml")


@pytest.mark.parametrize("main", [sample.main, plot.main], ids=["sample", "plot"])
@pytest.mark.parametrize(
    "arguments", [["--stepp", "4"], ["--step"], ["--count", "many"], ["--seed", "many"]], ids=lambda a: "-".join(a)
)
def test_sample_and_plot_refuse_bad_options_in_one_sentence(main: Any, arguments: list[str], finished: Path) -> None:
    assert_one_sentence(call(main, finished, *arguments))


def test_changed_data_is_refused(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    tokens = bytearray((data / "train.bin").read_bytes())
    tokens[10] ^= 1
    (data / "train.bin").write_bytes(tokens)
    assert_one_sentence(call(train.main, *options(data, tmp_path / "run")), "train.bin", "SHA-256", "prepare")


@pytest.mark.parametrize("main", [sample.main, plot.main], ids=["sample", "plot"])
class TestCheckpoints:
    """Give sample.py and plot.py something that is not a checkpoint."""

    def test_truncated(self, main: Any, run: Path) -> None:
        for path in (run / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:1000])
        assert_one_sentence(call(main, run), "damaged")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2]), b"PK\3\4" * 100])
    def test_foreign_bytes(self, main: Any, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "foreign.pt").write_bytes(content)
        assert_one_sentence(call(main, tmp_path / "foreign.pt"), "foreign.pt", "checkpoint")

    @pytest.mark.parametrize("content", [{}, [1], {"model": {}, "step": 3}, torch.zeros(3)], ids=type)
    def test_of_another_program(self, main: Any, tmp_path: Path, content: object) -> None:
        write_sealed(content, tmp_path / "other.pt")
        assert_one_sentence(call(main, tmp_path / "other.pt"), "other.pt", "not a checkpoint")

    @pytest.mark.parametrize(
        "change",
        [
            {"config": 3},
            {"config": {"n_layer": "many"}},
            {"config": {"unknown": 1}},
            {"config": {}},
            {"tokenizer": None},
            {"model": {}},
            {"model": 3},
            {"vocab_size": "ten"},
            {"vocab_size": 0},
            {"step": "one"},
        ],
        ids=str,
    )
    def test_with_a_damaged_entry(self, main: Any, tmp_path: Path, finished: Path, change: dict[str, Any]) -> None:
        state = torch.load(finished / "checkpoints/best.pt", weights_only=True)
        write_sealed({**state, **change}, tmp_path / "changed.pt")
        assert_one_sentence(call(main, tmp_path / "changed.pt"))

    def test_of_a_run_that_does_not_exist(self, main: Any, tmp_path: Path) -> None:
        assert_one_sentence(call(main, tmp_path / "none"), "none", "does not exist")
        assert_one_sentence(call(main, "x" * 5000))

    def test_of_a_directory_without_a_run(self, main: Any, tmp_path: Path) -> None:
        assert_one_sentence(call(main, tmp_path), "no checkpoint")

    def test_of_a_step_that_was_not_kept(self, main: Any, finished: Path) -> None:
        assert_one_sentence(call(main, finished, "--step", 4), "no checkpoint 4", "8, 12")
        assert_one_sentence(call(main, finished, "--step", "newest"), "newest", "latest")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_embd": 32}, ["n_embd=32", "16"]),
        ({"ffn": "mlp"}, ["ffn=mlp", "splines"]),
        ({"num_control_points": 7}, ["num_control_points=7", "5"]),
        ({"seed": 7}, ["seed=7", "1337"]),
    ],
    ids=str,
)
def test_a_resume_that_contradicts_the_run_is_refused(run: Path, changes: dict[str, Any], parts: list[str]) -> None:
    more = [f"--{name}={value}" for name, value in changes.items()]
    assert_one_sentence(call(train.main, *resume_options(run), *more), *parts)
    assert call(train.main, *resume_options(run)).code == 0, "the refused resume has spoilt the run"


def test_a_resume_on_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", "another text " * 100)
    assert_one_sentence(call(train.main, *resume_options(run), "--dataset", other), str(other), "not the data")


def test_a_resume_on_data_prepared_anew_with_other_text_is_refused(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", "one text " * 100)
    assert call(train.main, *options(data, tmp_path / "run")).code == 0
    make_dataset(data, "two text " * 100)
    assert_one_sentence(call(train.main, *resume_options(tmp_path / "run")), str(data), "not the data")


def test_a_resume_of_no_run_is_refused(tmp_path: Path) -> None:
    assert_one_sentence(call(train.main, *resume_options(tmp_path)), str(tmp_path), "no run to resume")
    assert_one_sentence(call(train.main, *resume_options(tmp_path / "none")), "no run to resume")


def test_a_resume_without_a_good_checkpoint_is_refused(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert_one_sentence(call(train.main, *resume_options(run)), "none of the 2 checkpoints")


@pytest.mark.parametrize("name", ["file", "file/run", "file/deeper/run"])
def test_an_out_dir_with_a_file_in_the_way_is_refused(tmp_path: Path, dataset: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_one_sentence(call(train.main, *options(dataset, tmp_path / name)), str(tmp_path / name), "--out_dir")


def test_an_out_dir_whose_name_is_too_long_is_refused(tmp_path: Path, dataset: Path) -> None:
    assert_one_sentence(call(train.main, *options(dataset, tmp_path / ("x" * 300))), "--out_dir")


def test_an_out_dir_whose_name_is_no_text_is_refused_or_can_be_resumed(tmp_path: Path, dataset: Path) -> None:
    run = tmp_path / "\udcff"  # how Python reads the byte 0xFF in a name
    result = call(train.main, *options(dataset, run))
    if result.code:
        assert_one_sentence(result, "--out_dir")
    else:
        assert call(train.main, *resume_options(run)).code == 0


def test_an_out_dir_with_a_folder_where_the_metrics_go_is_refused(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    assert_one_sentence(call(train.main, *options(dataset, tmp_path / "run")), str(tmp_path / "run"))


def test_an_out_dir_that_holds_a_run_is_refused_and_left_alone(dataset: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert_one_sentence(call(train.main, *options(dataset, finished)), str(finished), "--resume True", "--out_dir")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_vocabulary_smaller_than_the_models_is_refused(tmp_path: Path, finished: Path) -> None:
    state = torch.load(finished / "checkpoints/best.pt", weights_only=True)
    write_sealed({**state, "tokenizer": {"name": "char", "vocabulary": "xyz"}}, tmp_path / "changed.pt")
    assert_one_sentence(call(sample.main, tmp_path / "changed.pt"), "vocabulary of 3")


def test_a_prompt_beyond_the_vocabulary_is_refused_with_its_characters(finished: Path) -> None:
    assert_one_sentence(call(sample.main, finished, "--prompt", "the Ω\n\udcff"), "'Ω'", "vocabulary")
    assert_one_sentence(call(sample.main, finished, "--prompt", ""), "prompt is empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("num_samples", 0),
        ("temperature", -1),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("seed", 10**30),
        ("device", "quantum"),
        ("device", "meta"),
    ],
)
def test_impossible_sampling_is_refused(finished: Path, name: str, value: object) -> None:
    assert_one_sentence(call(sample.main, finished, "--prompt=t", f"--{name.replace('_', '-')}={value}"), name)


@pytest.mark.parametrize("temperature", ["1e-40", "1e-300", "1e38", "1e300"])
def test_extreme_temperatures_work(finished: Path, temperature: str) -> None:
    result = call(sample.main, finished, "--prompt=t", "--max-new-tokens=4", f"--temperature={temperature}")
    assert result.code == 0, result


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--layer", "1"], ["layer", "0 to 0"]),
        (["--layer=-1"], ["layer", "0 to 0"]),
        (["--count", "0"], ["count"]),
        (["--output", "a.png"], ["--layer"]),
        (["--layer", "0", "--output", "a.gif"], [".png"]),
        (["--layer", "0", "--output", f"{__file__}/a.png"], [f"{__file__}/a.png"]),
    ],
    ids=str,
)
def test_impossible_pictures_are_refused(finished: Path, arguments: list[str], parts: list[str]) -> None:
    assert_one_sentence(call(plot.main, finished, *arguments), *parts)


def test_a_run_without_splines_is_not_plotted(finished_mlp: Path) -> None:
    assert_one_sentence(call(plot.main, finished_mlp), "no splines", "ffn=mlp")
