"""Kernels on disk: one library for each source, rebuilt when damaged, built by several at once; and
no compiler.
"""

import os
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch

import functional_sgd as fs
from functional_sgd import fuse
from functional_sgd.fusion.backends import available
from functional_sgd.fusion.backends.c import cache as keeping
from functional_sgd.fusion.backends.c import compiler
from functional_sgd.fusion.backends.foreach import ForeachBackend
from tests.catalogue import RECIPES
from tests.comparing import assert_same
from tests.functional_sgd.fusion.helpers import OF_SUMS, check_steps

PARAMS = {"w": torch.ones(3)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no kernel remembered in the process, before and after."""
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(folder))
    compiler.function_of.cache_clear()
    monkeypatch.setattr(available, "_warned", set())
    yield folder
    compiler.function_of.cache_clear()


def step(opt=None):
    opt = fuse(fs.sgd(lr=0.5)) if opt is None else opt
    compiler.function_of.cache_clear()
    return opt(PARAMS, PARAMS, opt.init(PARAMS))[0]["w"].tolist()


def libraries(folder):
    return sorted(path.name for path in folder.glob("*.so"))


def test_one_library_for_each_source(cache):
    step()
    first = libraries(cache)
    step()
    step(fuse(fs.sgd(lr=0.5), donate=False))
    assert libraries(cache) == first
    step(fuse(fs.momentum(lr=0.5)))
    assert len(libraries(cache)) == len(first) + 1
    assert {path.suffix for path in cache.iterdir()} <= {".so", ".sha256"}, (
        "scratch files were left behind"
    )


def test_a_kernel_is_not_compiled_twice(cache, monkeypatch):
    step()
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert step() == [0.5] * 3


DAMAGES = {
    "rubbish": lambda so, mark: so.write_bytes(b"rubbish"),
    "empty": lambda so, mark: so.write_bytes(b""),
    "truncated": lambda so, mark: so.write_bytes(so.read_bytes()[:4000]),
    "flipped": lambda so, mark: so.write_bytes(so.read_bytes()[:-1] + b"?"),
    "no_library": lambda so, mark: so.unlink(),
    "no_digest": lambda so, mark: mark.unlink(),
    "wrong_digest": lambda so, mark: mark.write_text("0" * 64),
    "binary_digest": lambda so, mark: mark.write_bytes(b"\xff\xfe\x80"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_rebuilt(cache, tmp_path, monkeypatch, damage):
    step()
    copy = tmp_path / "copy"  # never loaded by this process: what is mapped must not be written to
    copy.mkdir()
    for path in cache.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for library in copy.glob("*.so"):
        damage(library, library.with_suffix(".sha256"))
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(copy))
    assert step() == [0.5] * 3
    assert libraries(copy) == libraries(cache)
    for library in copy.glob("*.so"):
        assert compiler._intact(library, library.with_suffix(".sha256"))


def test_processes_may_build_at_once(cache):
    code = (
        "import torch; from functional_sgd import adamw, fuse\n"
        "opt, params = fuse(adamw(lr=0.1)), [torch.ones(3)]\n"
        "print(opt(params, params, opt.init(params))[0][0].tolist())\n"
        "assert opt.working()[0].name == 'C'\n"
    )
    environment = {
        **os.environ,
        "FUNCTIONAL_SGD_CACHE": str(cache),
        "PYTHONWARNINGS": "error::UserWarning",
    }
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(set(outputs)) == 1
    assert all(compiler._intact(path, path.with_suffix(".sha256")) for path in cache.glob("*.so"))


def check_fallback(match):
    opt = fs.adamw(lr=0.1)
    with pytest.warns(UserWarning, match=match) as caught:
        first, second = fuse(opt), fuse(fs.lamb(lr=0.1), donate=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(first(PARAMS, PARAMS, opt.init(PARAMS)), opt(PARAMS, PARAMS, opt.init(PARAMS)))
        check_steps(fs.lamb(lr=0.1), PARAMS, fused=second, grads=lambda params, _: PARAMS)
        fuse(opt).explain()


def test_without_a_compiler_there_is_one_warning(cache, monkeypatch):
    def find_nothing():
        raise compiler.NoCompiler("there is none")

    monkeypatch.setattr(compiler, "find_compiler", find_nothing)
    check_fallback("there is none")


def test_an_empty_path(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    check_fallback("no C compiler")


def script(folder, text):
    path = folder / "badcc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("text", ["echo broken >&2; exit 1", "exit 0"])
def test_a_compiler_that_fails(cache, tmp_path, monkeypatch, text):
    monkeypatch.setenv("CC", script(tmp_path, text))
    check_fallback("badcc failed")


def test_a_compiler_that_is_killed(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "kill -9 $$"))
    check_fallback("badcc was ended by SIGKILL")


def test_a_compiler_that_writes_rubbish(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CC", script(tmp_path, 'while [ "$1" != "-o" ]; do shift; done; echo rubbish > "$2"')
    )
    check_fallback("does not load")


def test_a_compiler_that_fails_later(cache, monkeypatch):
    """It compiled the first try, then fails: results are the same, with a warning and no error."""
    opt = fs.adamw(lr=0.1)
    fast = fuse(opt)

    def fail(*_):
        raise compiler.NoCompiler("disk full")

    monkeypatch.setattr(compiler, "_compile", fail)
    with pytest.warns(UserWarning, match="disk full"):
        found = fast(PARAMS, PARAMS, opt.init(PARAMS))
    assert_same(found, opt(PARAMS, PARAMS, opt.init(PARAMS)))


def test_a_cache_that_cannot_be_written_is_moved_to_the_temporary_folder(
    cache, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(keeping, "_temporary", None)
    monkeypatch.setattr(keeping, "_warned", set())
    with pytest.warns(UserWarning, match="compiled code is not kept: .*file is no folder"):
        assert compiler.cache_folder().parent == tmp_path
    check_steps(
        fs.adamw(lr=0.1), PARAMS, fused=fuse(fs.adamw(lr=0.1)), grads=lambda params, _: PARAMS
    )


def test_where_kernels_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("FUNCTIONAL_SGD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "functional_sgd"
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(tmp_path / "own"))
    assert compiler.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_foreach_operators_do_what_a_kernel_would(name, donate, monkeypatch):
    opt = fuse(RECIPES[name](), donate=donate, backends=(ForeachBackend(),))
    tree = {"a": torch.ones(4, 3), "b": [torch.ones(2), torch.ones(())]}
    check_steps(
        RECIPES[name](), tree, donate=donate, fused=opt, more=8 if name in OF_SUMS else None
    )
