"""The shape of the code: which file may import which, and how long one may be."""

import ast
import functools
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import functional_sgd
import loop
from tests.each import for_each

ROOT = Path(__file__).parent.parent

ORDER = (
    "sibling errors fingerprint ranges pairs precision products tracing decompositions memo "
    "collectives sharded memory reduction randomness rounding blocks table notebook tree outputs "
    "guard packing signature rule trial wiring hyper state per_example call step optimizer "
    "chained chaining eight_bit schedules rules wrappers catalogue places placing autodiff lbfgs "
    "fusion restarting listing compile bridge"
).split()
"""Of functional_sgd: a module, or a folder of them, imports from what stands before it, and from
its own folder.
"""

LOOP_ORDER = (
    "run.events run.signals run.chance columns history state layout remembered donation emptied "
    "replaced disk hyper_log callback layer_groups layer_stats data losses metrics plots learner "
    "run callbacks training ranks tools"
).split()
"""Of loop, the same; a module with a place of its own is not in that of its folder."""

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


def place(name: str) -> str:
    """What a module is called in the order of its package; "" if it has no place."""
    package, *parts = name.split(".")
    order = LOOP_ORDER if package == "loop" else ORDER
    own = ".".join(parts[:2])
    if own in order:
        return own
    return parts[0] if parts and parts[0] in order else ""


def rank(name: str) -> int:
    order = LOOP_ORDER if name.startswith("loop") else ORDER
    return order.index(place(name))


def points_up(name: str, other: str) -> bool:
    """Whether a module that imports another of its package does so against the order."""
    return place(other) != place(name) and rank(other) >= rank(name)


INNER = [name for name in MODULES if "." in name]


@for_each("name", INNER)
def test_every_module_has_a_place_in_the_order(name: str) -> None:
    assert place(name)


@for_each("name", INNER)
def test_imports_point_one_way(name: str) -> None:
    """Within each package; those for types only may point anywhere in loop, since they
    never run.
    """
    package = name.split(".")[0]
    upwards = {
        other
        for other in imports_of(name, also_for_types=package == "functional_sgd")
        if other == package or (other.startswith(f"{package}.") and points_up(name, other))
    }
    assert not upwards


@for_each("name", [name for name in MODULES if name.startswith("functional_sgd")])
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


@for_each("name", [n for n, f in MODULES.items() if f.name == "__init__.py"])
def test_every_package_says_what_it_gives(name: str) -> None:
    package = importlib.import_module(name)
    assert all(hasattr(package, one) for one in package.__all__)


def test_no_public_name_has_two_meanings() -> None:
    both = {*functional_sgd.__all__} & {*loop.__all__}
    assert all(getattr(functional_sgd, name) is getattr(loop, name) for name in both)


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


@for_each("file", FILES)
def test_no_file_is_longer_than_it_may_be(file: str) -> None:
    """Lines that say why are free."""
    lines = (ROOT / file).read_text().splitlines()
    assert sum(not line.lstrip().startswith("#") for line in lines) <= MAX_LINES


def test_the_imports_that_are_checked_are_the_real_ones() -> None:
    """The test above reads imports the way that Python does."""
    assert "functional_sgd.rule" in imports_of("functional_sgd.chaining")
    assert "functional_sgd.rules" in imports_of("functional_sgd.catalogue.descent")


HEAVY = (
    "torchvision sklearn matplotlib rich PIL torch._dynamo triton tensorboard IPython "
    "torch.distributed.tensor"
).split()


@pytest.mark.parametrize("heavy", [*HEAVY, "loop"])
def test_functional_sgd_does_not_load(heavy: str) -> None:
    assert heavy not in loaded_by("functional_sgd")


def test_one_file_knows_dtensor() -> None:
    """Two, in fact: what a step does with pieces, and how they are cut and joined."""
    found = {file for file in FILES if "distributed.tensor" in (ROOT / file).read_text()}
    ours = {file for file in found if file.startswith(("functional_sgd", "loop"))}
    assert ours == {"functional_sgd/sharded.py", "loop/layout.py"}


def test_the_machine_knows_nothing_of_ranks() -> None:
    """Only loop.ranks talks to other processes; files and layouts ask whether a piece is theirs."""
    found = {file for file in FILES if "torch.distributed" in (ROOT / file).read_text()}
    ours = {file for file in found if file.startswith("loop") and "/ranks/" not in file}
    assert ours == {"loop/layout.py", "loop/learner.py"}  # which refuses DDP and FSDP


@pytest.mark.parametrize("heavy", HEAVY)
def test_loop_does_not_load(heavy: str) -> None:
    """What only some callbacks and pictures need is imported when these are used."""
    assert heavy not in loaded_by("loop")


@functools.cache
def loaded_by(package: str) -> frozenset[str]:
    """What is in memory after an import, and was not after `import torch`."""
    code = f"import torch, sys; before = {{*sys.modules}}; import {package}; "
    code += "print(*{*sys.modules} - before)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert process.returncode == 0, process.stderr
    names = frozenset(process.stdout.split())
    assert package in names
    return names
