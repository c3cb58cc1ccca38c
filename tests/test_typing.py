"""What the docs pass to the library is what its types say: mypy reads them as a user's code."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed"
)


# With the settings of pyproject.toml, and its cache, which `make check` has filled: then torch need
# not be read again.
CONFIG = """
[mypy]
strict = True

[mypy-matplotlib.*,sklearn.*,mpl_toolkits.*,triton.*,torchvision.*]
ignore_missing_imports = True

[mypy-readme]
# A README is brief: it does not annotate every rule, ask whether something is None, or return None.
disallow_untyped_defs = False
disallow_untyped_decorators = False
disallow_any_generics = False
strict_optional = False
disable_error_code = return, assignment, no-redef
"""

USER = """
import torch
from torch import nn

from functional_sgd import adamw
from loop import Batches, DataLoaders, Learner, Progress, State, accuracy, fit
from loop.metrics import F1

x = torch.randn(8, 2)
data = DataLoaders(Batches((x, x), 4))
learner = Learner(nn.Linear(2, 2), data, nn.functional.mse_loss, adamw(), [accuracy], [Progress()])
scored = Learner(nn.Linear(2, 2), data, nn.functional.mse_loss, adamw(), metrics=[accuracy, F1()])
end: State = fit(learner, learner.init(), 1, [Progress()], lr=0.1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where README's code lies as a user's."""
    folder = tmp_path_factory.mktemp("user")
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    plain = [block for block in blocks if not block.lstrip().startswith(">>>")]
    (folder / "readme.py").write_text("\n".join(plain))
    (folder / "user.py").write_text(USER)
    (folder / "mypy.ini").write_text(CONFIG)
    return folder


def test_it_is_typed(folder: Path) -> None:
    """All of it in one go: most of the time mypy reads torch."""
    path = os.pathsep.join([str(folder), str(ROOT / "examples")])
    own = [folder / "readme.py", folder / "user.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={folder / 'mypy.ini'}", *own, *EXAMPLES],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed"
)
def test_pyright_reads_it_too(folder: Path) -> None:
    """In pyright's standard mode."""
    settings = {
        "typeCheckingMode": "standard",
        "include": ["readme.py", "user.py", *map(str, EXAMPLES)],
        "extraPaths": [str(ROOT), str(ROOT / "examples")],
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", ".", "--pythonpath", sys.executable]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
