"""The rooms of docs/ARCHITECTURE.md: imports run one way, and each room keeps to what its name says."""

import ast
from pathlib import Path

import pytest
from conftest import REPO

ROOMS = ("config", "data", "device", "model", "training", "inference", "evaluation", "scripts")  # imports run leftwards
SCRIPTS = ("train", "generate", "evaluate", "export", "serve", "train_custom_tokenizer")


def room_of(module: str) -> str | None:
    """The room of a module of this project; None for other modules."""
    top = module.partition(".")[0]
    return "scripts" if top in SCRIPTS else top if top in ROOMS else None


def modules() -> dict[str, ast.Module]:
    """Every product module by its dotted name, parsed."""
    files = [*REPO.glob("*.py"), *(file for room in ROOMS for file in (REPO / room).rglob("*.py"))]
    return {".".join(file.relative_to(REPO).with_suffix("").parts): ast.parse(file.read_text(encoding="utf-8"))
            for file in files}


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules that a file imports, anywhere in it but under `if TYPE_CHECKING`."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else node.module
                      for alias in node.names}
        else:
            found |= imports(node, known)
    return found


TREES = modules()
IMPORTS = {name: imports(tree, set(TREES)) for name, tree in TREES.items()}


def in_room(room: str) -> list[str]:
    return [name for name in TREES if room_of(name) == room]


def test_every_module_is_in_a_room():
    assert all(room_of(name) for name in TREES), [name for name in TREES if not room_of(name)]
    assert all(in_room(room) for room in ROOMS)
    assert not {Path(name.replace(".", "/")).name for name in TREES} & {"utils", "util", "common", "helpers", "misc"}


def test_imports_run_one_way():
    for name, imported in IMPORTS.items():
        for other in imported:
            if room_of(other):
                assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(name)), f"{name} imports {other}"


def test_no_circle_of_imports():
    seen: dict[str, int] = {}  # 1: on the path, 2: done

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert seen.get(name) != 1, " -> ".join((*path, name))
        if name in seen:
            return
        seen[name] = 1
        for other in IMPORTS[name]:
            target = other if other in TREES else f"{other}.__init__"
            if target in TREES:
                visit(target, (*path, name))
        seen[name] = 2

    for name in TREES:
        visit(name, ())


def test_no_script_imports_a_script():
    for name in in_room("scripts"):
        assert not [other for other in IMPORTS[name] if room_of(other) == "scripts"], name


@pytest.mark.parametrize(("room", "forbidden", "except_for"), [
    ("config", ("torch", "numpy"), ()), ("data", ("torch", "training", "evaluation"), ("data.batches",)),
    ("model", ("data", "training", "pathlib"), ()), ("training", ("inference", "evaluation"), ())])
def test_what_a_room_must_never_import(room, forbidden, except_for):
    for name in in_room(room):
        for other in IMPORTS[name]:
            assert name in except_for or other.partition(".")[0] not in forbidden, f"{name} imports {other}"


def calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("room", ["inference", "evaluation"])
def test_inference_and_evaluation_do_not_print_or_read_a_command_line(room):
    for name in in_room(room):
        printing = {"print", "tqdm.write", "sys.stdout.write", "sys.stderr.write"} & calls(TREES[name])
        assert not printing and not IMPORTS[name] & {"argparse", "config.command_line"}, name


def test_the_model_opens_no_file():
    assert not {"open", "torch.load", "torch.save", "Path"} & calls(TREES["model"])


def test_the_tree_of_tests_mirrors_the_rooms():
    tests = [path.relative_to(REPO / "tests") for path in (REPO / "tests").rglob("test_*.py")]
    for room in ROOMS:
        assert any(room in path.parts or path.name.startswith(f"test_{room}") for path in tests), room
