"""Kernels calculate with vectors: a loop that the compiler cannot turn into them is several times
as slow.
"""

import platform
import re
import shutil
import subprocess

import pytest

import functional_sgd as fs
from functional_sgd.fusion.backends.c.compiler import _EXACT, _FLAGS

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or platform.machine() != "x86_64", reason="looks at gcc's x86-64"
)

ARITHMETIC = re.compile(r"\bv?(?:add|sub|mul|div|sqrt)ps\s")


def vectors_of(name: str) -> list[int]:
    """How many instructions of each kernel are arithmetic on vectors of float32."""
    parts = re.split(r"(?=#include <math.h>)", fs.fuse(getattr(fs, name)()).source())
    flags = [flag for flag in (*_FLAGS, *_EXACT) if flag not in ("-shared", "-march=native")]
    command = ["gcc", *flags, "-march=x86-64-v3", "-fopenmp", "-S", "-x", "c", "-o", "-", "-"]
    found = []
    for part in filter(str.strip, parts):
        done = subprocess.run(command, input=part, capture_output=True, text=True, check=True)
        found.append(len(ARITHMETIC.findall(done.stdout)))
    return found


@pytest.mark.parametrize("name", ["adamw", "adabound", "adai", "adopt", "cocob", "rprop", "sophia"])
def test_a_clamp_keeps_vectors(name: str) -> None:
    """All but AdamW cut numbers to ranges; two cuts in a row were branches once."""
    assert all(count >= 2 for count in vectors_of(name))
