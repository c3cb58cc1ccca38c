"""What the packages say of themselves, and what they bring into a script."""

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import functional_sgd
import loop

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(
    ".".join(file.parent.relative_to(ROOT).parts)
    for name in ("functional_sgd", "loop")
    for file in (ROOT / name).rglob("__init__.py")
    if "__all__" in file.read_text() or name == "loop"
)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_what_the_package_exports(package: str) -> None:
    """`from x import y as y`, what a star brings, or what is imported by a list that __all__ is."""
    module = importlib.import_module(package)
    names = {name for name, value in vars(module).items() if not inspect.ismodule(value)}
    public = {name for name in names if not name.startswith("_")} - {"NAMES", "TYPE_CHECKING"}
    assert {*module.__all__} - {"__version__"} == public
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_star_brings_public_names_and_no_modules(package: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {package} import *", names)
    names.pop("__builtins__")
    assert {name for name, value in names.items() if inspect.ismodule(value)} == set()
    assert {name for name in names if name.startswith("_")} <= {"__version__"}


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert functional_sgd.__version__ == loop.__version__ == project["version"]


def warnings_of(script: Path, code: str) -> str:
    """What a script in a folder of its own says on standard error."""
    script.write_text(code)
    path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=path, timeout=300, check=False
    )
    return done.stderr


@pytest.mark.parametrize("name", ["loop.py", "loop/__init__.py"])
def test_a_neighbour_of_the_script_that_hides_the_loop_is_noticed(
    name: str, tmp_path: Path
) -> None:
    neighbour = tmp_path / name
    neighbour.parent.mkdir(exist_ok=True)
    neighbour.write_text("")
    said = warnings_of(tmp_path / "train.py", "import functional_sgd")
    assert f"`import loop` gives {neighbour}, which hides the package `loop`" in said


def test_nothing_is_said_where_nothing_hides_it(tmp_path: Path) -> None:
    assert warnings_of(tmp_path / "train.py", "import functional_sgd, loop") == ""
