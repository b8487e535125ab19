"""The layout: only named modules at the root, no import circles, and no package that imports from one above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train", "sample", "report", "plot", "simplify", "convert", "export"}
MODEL = {"model", "model_options", "attention", "feed_forward", "embeddings", "kan_layer", "pair_layer", "swap"}
PACKAGES = {"backends", "splines", "pictures", "corpus", "common", "training", "webpage", "bench"}
# Only benchmarks import commands, and train.py, which samples and reports during training.
USED_BY_TRAIN = {"sample", "report"}


def modules() -> dict[str, Path]:
    """All modules of the project except tests, by their dotted names."""
    files = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, including imports under TYPE_CHECKING and inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = parts & MODULES.keys()
            found |= inner if len(inner) == len(parts) else {node.module, *inner}
    return (found & MODULES.keys()) - {name}


IMPORTS = {name: imports(name) for name in MODULES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each module that can be reached from itself, found by depth-first search."""
    found, finished = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in finished:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            finished.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_module_imports_itself_through_others() -> None:
    assert circles({"a": {"b"}, "b": {"a"}, "c": set()}) == [["a", "b", "a"]], "the search finds circles"
    assert circles(IMPORTS) == []


def test_the_root_holds_the_commands_and_the_model() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | MODEL
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == PACKAGES | {"tests"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_commands_are_not_libraries(name: str) -> None:
    allowed = COMMANDS if name.startswith("bench") else USED_BY_TRAIN if name == "train" else set()
    assert not (IMPORTS[name] & COMMANDS) - allowed


# What each module or package may import from the others. Commands and benchmarks may import all.
BELOW = {
    "common": set(),
    "corpus": {"common"},
    "splines": {"backends", "common"},
    "pictures": {"splines", "common"},
    "backends": {"common"},
    "attention": {"backends", "embeddings"},
    "model_options": set(),
    "feed_forward": {"kan_layer", "pair_layer", "model_options"},
    "embeddings": {"common"},
    "kan_layer": {"backends", "splines", "pictures", "common"},
    "pair_layer": {"backends", "splines", "common"},
    "swap": {"kan_layer", "common"},
    "model": {
        "model_options",
        "kan_layer",
        "pair_layer",
        "swap",
        "attention",
        "feed_forward",
        "embeddings",
        "backends",
        "splines",
        "common",
    },
    "training": {"model", "model_options", "swap", "kan_layer", "backends", "corpus", "splines", "pictures", "common"},
    "webpage": {
        "training",
        "model",
        "model_options",
        "kan_layer",
        "pair_layer",
        "corpus",
        "splines",
        "pictures",
        "common",
    },
}


@pytest.mark.parametrize("room", sorted(BELOW))
def test_a_room_knows_only_those_below_it(room: str) -> None:
    for name in MODULES:
        if name.split(".")[0] == room:
            known = {other.split(".")[0] for other in IMPORTS[name]} - {room}
            assert known <= BELOW[room], f"{name} imports from {sorted(known - BELOW[room])}"
