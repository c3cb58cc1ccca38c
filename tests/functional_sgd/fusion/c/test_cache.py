"""The cache of compiled code: nobody else's libraries are run; compilers that fail are tried again,
but do not cost more than they are worth.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

import functional_sgd as fs
from functional_sgd import fuse
from functional_sgd.fusion.backends.c import cache as keeping
from functional_sgd.fusion.backends.c import compiler
from tests.functional_sgd.fusion.c.test_compiler import script

SOURCE = "int run(void) { return 7; }\n"
PLANTED = "int run(void) { return 666; }\n"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache that is not there yet, and a process that has warned of nothing."""
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(keeping, "_temporary", None)
    for module, name, empty in (
        (keeping, "_warned", set()),
        (compiler, "_failed", {}),
    ):
        monkeypatch.setattr(module, name, empty)
    yield tmp_path / "cache"
    compiler._openmp.cache_clear()


def plant():
    """Put another library, with its digest, where that of SOURCE belongs; none is loaded yet."""
    command = compiler.find_compiler()
    flags = (*compiler._FLAGS, *compiler._EXACT, *compiler._openmp(command))
    folder = compiler.cache_folder()
    target, planted = (
        compiler._built(command, flags, source, folder) for source in (SOURCE, PLANTED)
    )
    for ending in (".so", ".sha256"):
        shutil.copy(planted.with_suffix(ending), target.with_suffix(ending))


# Whose library is run


def test_a_planted_library_in_a_folder_of_ones_own_would_be_run(place):
    """What the tests below rely on: the library fits in every other way."""
    plant()
    assert compiler.load(SOURCE).run() == 666


@as_root
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_library_planted_by_another_user_is_not_run(place, what):
    plant()
    for path in [place] if what == "folder" else place.iterdir():
        os.chown(path, 12345, 12345)
    if what == "folder":
        with pytest.warns(UserWarning, match=r"cache belongs to another user \(uid 12345\)"):
            assert compiler.load(SOURCE).run() == 7
    else:
        assert compiler.load(SOURCE).run() == 7


@as_root
def test_a_folder_in_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    inner = tmp_path / "theirs" / "cache"
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(inner))
    plant()
    os.chown(inner.parent, 12345, 12345)
    with pytest.warns(UserWarning, match="theirs belongs to another user"):
        assert compiler.load(SOURCE).run() == 7


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_trusted(place, mode):
    plant()
    place.chmod(mode)
    with pytest.warns(UserWarning, match=f"others can write to .*mode {mode:04o}"):
        assert compiler.load(SOURCE).run() == 7


@pytest.mark.parametrize("mode", [0o722, 0o702])
def test_a_library_that_others_can_write_to_is_not_run(place, mode):
    plant()
    for path in place.glob("*.so"):
        path.chmod(mode)
    assert compiler.load(SOURCE).run() == 7


def test_a_folder_in_one_that_others_can_write_to_is_not_trusted(tmp_path, monkeypatch):
    inner = tmp_path / "shared" / "cache"
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(inner))
    plant()
    inner.parent.chmod(0o777)
    with pytest.warns(UserWarning, match="others can write to .*shared"):
        assert compiler.load(SOURCE).run() == 7


def test_a_link_is_looked_at_where_it_leads(place, tmp_path):
    plant()
    place.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o777)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="others can write to .*elsewhere"):
        assert compiler.load(SOURCE).run() == 7


def test_the_folder_is_private_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        compiler.load(SOURCE)
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b", *(tmp_path / "a" / "b").glob("*.so")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_temporary_folder_is_private_and_ends_with_the_process(place, tmp_path):
    place.write_text("in the way")
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from functional_sgd.fusion.backends.c.cache import cache_folder\n"
        "folder = cache_folder(); print(folder, oct(folder.stat().st_mode & 0o777))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    folder, mode = found.stdout.split()
    assert mode == "0o700"
    assert Path(folder).parent == tmp_path
    assert not Path(folder).exists()


# Disks


def test_a_home_that_is_nobodys(monkeypatch, tmp_path):
    """Path.home() raises RuntimeError where HOME is not set and the user has no entry."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert compiler.load(SOURCE).run() == 7
    monkeypatch.delenv("FUNCTIONAL_SGD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        assert compiler.load(SOURCE).run() == 7


def fail_in(folder, monkeypatch, number=28):
    """Nothing can be written in this folder: its disk is full."""
    make = tempfile.mkdtemp

    def mkdtemp(suffix=None, prefix=None, dir=None):
        if str(dir or tempfile.tempdir).startswith(str(folder)):
            raise OSError(number, os.strerror(number), str(dir))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)


@pytest.mark.parametrize("number", [28, 30, 13, 122], ids=lambda number: os.strerror(number))
def test_a_cache_that_cannot_be_written_is_said_and_compiled_code_runs(place, monkeypatch, number):
    compiler.cache_folder()
    fail_in(place, monkeypatch, number)
    with pytest.warns(UserWarning, match=f"not kept: .*{os.strerror(number)}"):
        assert compiler.load(SOURCE).run() == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert compiler.load(PLANTED).run() == 666


def test_a_cache_that_is_only_read_is_used(place, monkeypatch):
    compiler.load(SOURCE)
    fail_in(place, monkeypatch, 30)
    assert compiler.load(SOURCE).run() == 7


def test_where_nothing_can_be_written_there_is_one_warning_and_foreach(tmp_path, monkeypatch):
    fail_in(tmp_path, monkeypatch)
    compiler.function_of.cache_clear()
    with pytest.raises(compiler.NoCompiler, match="no place for compiled code.*No space left"):
        compiler.load(SOURCE)
    monkeypatch.setattr("functional_sgd.fusion.backends.available._warned", set())
    params = {"w": torch.ones(2)}
    with pytest.warns(UserWarning, match="no place for compiled code.*foreach"):
        opt = fuse(fs.sgd(lr=0.5))
    assert opt(params, params, opt.init(params))[0]["w"].tolist() == [0.5] * 2
    compiler.function_of.cache_clear()


def test_what_killed_compiles_have_left_goes_after_an_hour(place):
    compiler.load(SOURCE)
    for name, age in ((".compiling-old", 3700), (".compiling-new", 60)):
        (place / name).mkdir()
        os.utime(place / name, (time.time() - age,) * 2)
    compiler.load(PLANTED)
    assert [path.name for path in place.glob(".compiling-*")] == [".compiling-new"]


# Compilers


def test_cc_may_have_arguments(tmp_path, monkeypatch):
    wrapper = script(tmp_path, 'echo used >> $(dirname $0)/log; exec "$@"')
    monkeypatch.setenv("CC", f"{wrapper} gcc")
    assert compiler.load(SOURCE).run() == 7
    assert (tmp_path / "log").read_text() == "used\n"


def test_a_quotation_mark_in_cc_that_is_not_closed(monkeypatch):
    monkeypatch.setenv("CC", 'gcc "')
    assert compiler.load(SOURCE).run() == 7


def test_a_compiler_that_hangs_is_waited_for_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "echo >> $(dirname $0)/log; sleep 100 & wait"))
    monkeypatch.setattr(compiler, "PATIENCE", 0.2)
    for source in (SOURCE, SOURCE, PLANTED):
        with pytest.raises(compiler.NoCompiler, match="does not come to an end") as caught:
            compiler.load(source)
        assert caught.value.retry_at > time.monotonic() + 15
    assert (tmp_path / "log").read_text() == "\n"


def test_what_a_compiler_has_started_is_ended_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "sleep 100 & echo $! > $(dirname $0)/pid; wait"))
    monkeypatch.setattr(compiler, "PATIENCE", 0.5)
    with pytest.raises(compiler.NoCompiler):
        compiler.load(SOURCE)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_failure_is_remembered_until_it_is_time(place, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(compiler.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("CC", script(tmp_path, "exit 1"))
    for later, retry in ((0, 1060.0), (59, 1060.0), (61, 1121.0)):
        clock[0] = 1000.0 + later
        with pytest.raises(compiler.NoCompiler, match="badcc failed") as caught:
            compiler.load(SOURCE)
        assert caught.value.retry_at == retry
    (tmp_path / "badcc").write_text('#!/bin/sh\nexec gcc "$@"\n')
    clock[0] = 1000.0 + 200
    assert compiler.load(SOURCE).run() == 7


def test_another_compiler_is_tried_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "exit 1"))
    with pytest.raises(compiler.NoCompiler):
        compiler.load(SOURCE)
    monkeypatch.setenv("CC", "gcc")
    assert compiler.load(SOURCE).run() == 7


def test_a_source_that_does_not_compile_is_no_reason_for_others():
    with pytest.raises(compiler.NoCompiler, match="failed"):
        compiler.load("this is not C")
    assert compiler.load(SOURCE).run() == 7


def test_ctrl_c_while_a_kernel_compiles_does_not_reach_the_compiler(tmp_path, monkeypatch):
    """The terminal's signal goes to the whole group of processes; here it comes while gcc waits."""
    wait = "while [ ! -e $(dirname $0)/go ]; do sleep 0.01; done; exec gcc"
    path = script(tmp_path, f'echo > $(dirname $0)/started; {wait} "$@"')
    code = (
        "import signal, sys\n"
        "from functional_sgd.fusion.backends.c import compiler\n"
        "caught = []\n"
        "signal.signal(signal.SIGINT, lambda *_: (caught.append(1), open(sys.argv[1], 'w')))\n"
        f"print(compiler.load({SOURCE!r}).run(), caught)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "go")],
        env={**os.environ, "CC": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "7 [1]\n"
