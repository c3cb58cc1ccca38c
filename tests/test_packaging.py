"""What the packages say of themselves, what they bring into a script, and what is in the files that
are installed.
"""

import email
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_project() -> None:
    assert functional_sgd.__version__ == loop.__version__ == PROJECT["version"]


def test_the_oldest_python_is_the_same_everywhere() -> None:
    """In what pip reads, what people read, what ruff assumes, and what `make` asks for."""
    listed = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))
    assert listed == [str(minor) for minor in range(11, 15)]
    assert PROJECT["requires-python"] == f">=3.{listed[0]}"
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == f"py3{listed[0]}"
    assert f"sys.version_info < (3, {listed[0]})" in (ROOT / "Makefile").read_text()
    assert f"Python 3.{listed[0]}+" in (ROOT / "README.md").read_text()


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


# What is installed.


@dataclass(frozen=True)
class Built:
    """A wheel and a source distribution."""

    wheel: Path
    sdist: Path


def build(tree: Path, out: Path) -> Built:
    """What the build backend makes of a source tree; nothing is downloaded."""
    code = "import sys; from setuptools import build_meta as backend; out = sys.argv[1]; "
    code += "print(backend.build_sdist(out)); print(backend.build_wheel(out))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        capture_output=True,
        text=True,
        cwd=tree,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Of a copy of the sources: a build leaves folders behind."""
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < 77:
        pytest.skip("setuptools is older than the build needs")
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("functional_sgd", "loop", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, tree)
    return build(tree, tmp_path_factory.mktemp("built"))


def sources() -> set[str]:
    """The files of both packages."""
    return {
        str(file.relative_to(ROOT))
        for package in ("functional_sgd", "loop")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def test_the_wheel_has_both_packages_and_nothing_else(built: Built) -> None:
    names = {name for name in names_in(built.wheel) if ".dist-info/" not in name}
    assert names == sources()
    assert {"functional_sgd/py.typed", "loop/py.typed"} <= names


def test_the_source_distribution_has_what_a_build_needs_and_no_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    besides = {name for name in files - sources() if ".egg-info/" not in name}
    assert sources() <= files
    assert besides == {
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"),
        *("PKG-INFO", "setup.cfg"),
    }


def test_a_wheel_of_the_source_distribution_is_the_same(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    again = build(tree, tmp_path / "out")
    with zipfile.ZipFile(built.wheel) as one, zipfile.ZipFile(again.wheel) as other:
        assert {name: one.read(name) for name in one.namelist() if "RECORD" not in name} == {
            name: other.read(name) for name in other.namelist() if "RECORD" not in name
        }


def test_what_the_wheel_says_of_itself(built: Built) -> None:
    said = metadata_of(built.wheel)
    assert (said["Name"], said["Version"]) == ("functional-sgd", functional_sgd.__version__)
    assert said["Requires-Python"] == PROJECT["requires-python"]
    assert said["License-Expression"] == "MIT"
    assert said["Author"] == "the functional_sgd developers"
    needed = {one for one in said.get_all("Requires-Dist", []) if "extra ==" not in one}
    assert needed == {*PROJECT["dependencies"]}
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().startswith("# functional_sgd")


def output_of(*command: Any, cwd: Path = ROOT) -> list[str]:
    """The lines that a process prints."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_readme_begins_with_runs_where_only_the_wheel_is_installed(
    built: Built, tmp_path: Path
) -> None:
    """In an environment of its own, which sees torch and the like in this one."""
    try:
        version("pip")
    except PackageNotFoundError:
        pytest.skip("pip is not installed")
    python = venv.EnvBuilder().ensure_directories(tmp_path / "bare").env_exe
    venv.create(tmp_path / "bare")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    output_of(*pip, "install", "--quiet", "--no-deps", "--no-index", built.wheel)
    (site,) = output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(site) / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    (tmp_path / "readme.py").write_text(
        f"{block}\nimport functional_sgd, loop\n"
        "print(functional_sgd.__file__, loop.__file__, sep='\\n')\n"
        "fused, _ = fast(params, grads, fast.init(params), dict(lr=0.1))\n"
        "for found in (new_params, fused):\n"
        "    print([round(value, 4) for value in found['w'].tolist()])\n"
    )
    first, second, *numbers = output_of(python, "-I", tmp_path / "readme.py", cwd=tmp_path)
    assert [Path(file).parent for file in (first, second)] == [
        Path(site) / "functional_sgd",
        Path(site) / "loop",
    ]
    assert numbers == ["[0.9, 2.1]", "[0.9, 2.1]"]  # the first step of Adam is lr, for each
