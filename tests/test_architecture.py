"""The shape of the code: which file may import which, and how long one may be."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = (
    "errors ranges reduction randomness table tracing tree guard packing signature rule trial "
    "wiring hyper state call step optimizer chaining schedules rules wrappers recipes autodiff "
    "fusion compile bridge"
).split()
"""Of functional_sgd: a module, or a folder of them, imports from what stands before it, and from
its own folder.
"""

MAX_LINES = 400


def modules_of(package: str) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = {**modules_of("functional_sgd"), **modules_of("loop")}


def for_types_only(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(name: str, also_for_types: bool = True) -> set[str]:
    """The modules of both packages that a module imports, anywhere in it."""
    found = set()
    tree = ast.parse(MODULES[name].read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if for_types_only(node) and not also_for_types
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                base = ".".join(
                    [
                        *package.split(".")[: len(package.split(".")) + 1 - node.level],
                        *filter(None, [base]),
                    ]
                )
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            names_of_base = {
                alias.name for alias in node.names if f"{base}.{alias.name}" not in MODULES
            }
            found |= submodules | ({base} if names_of_base else set())
    return found & MODULES.keys()


def rank(name: str) -> int:
    return ORDER.index(name.split(".")[1])


INNER = [name for name in MODULES if name.startswith("functional_sgd.")]


@pytest.mark.parametrize("name", INNER)
def test_every_module_has_a_place_in_the_order(name: str) -> None:
    assert name.split(".")[1] in ORDER


@pytest.mark.parametrize("name", INNER)
def test_imports_point_one_way(name: str) -> None:
    upwards = {
        other
        for other in imports_of(name)
        if other == "functional_sgd"
        or (rank(other) >= rank(name) and other.split(".")[1] != name.split(".")[1])
    }
    assert not upwards


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("functional_sgd")])
def test_functional_sgd_never_imports_loop(name: str) -> None:
    assert not {other for other in imports_of(name) if other.split(".")[0] == "loop"}


@pytest.mark.parametrize("package", ["functional_sgd", "loop"])
def test_there_is_no_import_cycle(package: str) -> None:
    graph = {
        name: imports_of(name, also_for_types=False) - {name}
        for name in MODULES
        if name.split(".")[0] == package
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


def test_the_machine_knows_no_callback() -> None:
    names = [name for name in MODULES if name == "loop.run.machine"]
    assert not {
        other for name in names for other in imports_of(name) if other.startswith("loop.callbacks")
    }


FILES = [
    str(file.relative_to(ROOT))
    for folder in ("functional_sgd", "loop", "tests", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_longer_than_it_may_be(file: str) -> None:
    assert len((ROOT / file).read_text().splitlines()) <= MAX_LINES


def test_the_imports_that_are_checked_are_the_real_ones() -> None:
    """The test above reads imports the way that Python does."""
    assert "functional_sgd.rule" in imports_of("functional_sgd.chaining")
    assert "functional_sgd.rules" in imports_of("functional_sgd.recipes")


@pytest.mark.parametrize(
    "heavy", ["torchvision", "sklearn", "matplotlib", "loop", "torch._dynamo", "triton"]
)
def test_functional_sgd_does_not_load(heavy: str, loaded: set[str]) -> None:
    assert heavy not in loaded


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """What is imported by `import functional_sgd`."""
    code = "import sys, functional_sgd; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert process.returncode == 0, process.stderr
    names = set(process.stdout.split())
    assert "functional_sgd" in names
    return names
