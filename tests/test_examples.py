"""The examples: built and run as the head of each says, on /dev/kvm and scripted."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from processes import needs_gil

import kvmexit
from kvmexit import native

EXAMPLES = Path(__file__).parent.parent / "examples"


def commands(path):
    """-> the shell commands in a file's head, without those that install something."""
    head = re.search(r'/\*(.*?)\*/|"""(.*?)"""', path.read_text(), re.S)
    lines = re.sub(r"^ \* ?", "", (head[1] or head[2]), flags=re.M).replace("\\\n", " ")
    found = [line.strip() for line in lines.splitlines() if re.match(r" *(cc|python|CFLAGS=.*cythonize|\./)\b", line)]
    assert found
    return found


def config():
    """-> python3-config of the interpreter that runs us, or None."""
    name = f"python{sysconfig.get_config_var('VERSION')}-config"
    found = Path(sys.base_exec_prefix) / "bin" / name
    return found if found.exists() else shutil.which(name)


@pytest.fixture(params=["kvm", "scripted"])
def build(request, tmp_path):
    """build(file): run its commands in a copy of the examples; -> what the last one printed."""
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, target in (("python", sys.executable), ("python3", sys.executable), ("python3-config", config())):
        if target:  # not a link: an interpreter looks for its venv where it lies
            (programs / name).write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
            (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": os.pathsep.join([str(programs), os.path.dirname(sys.executable), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry and not entry.endswith(".zip")),
        "KVM_DEVICE": "/dev/kvm" if request.param == "kvm" else "/nonexistent",
    }  # fmt: skip

    def build(path):
        for command in commands(tmp_path / "examples" / path):
            done = subprocess.run(command, shell=True, cwd=tmp_path / "examples", env=environment, capture_output=True, text=True,
                                  timeout=100, check=False)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert (request.param == "scripted") == ("scripted: " in done.stdout)
        return done.stdout

    return build


def needs(module):
    """Skip where a package is missing."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize(
    ("path", "module"),
    [("handler_ctypes.py", "ctypes"), ("handler_cffi.py", "cffi"), ("handler_numba.py", "numba"), ("handler_c/echomodule.c", "ctypes"),
     ("handler_cython/echo_cython.pyx", "Cython")],
)  # fmt: skip
def test_a_handler(build, path, module):
    needs(module)
    assert build(path).endswith("echo: 1200 accesses, all answered without Python\n")


@needs_gil("this one is built without a library to link with")
def test_a_c_program_that_embeds(build):
    if config() is None:
        pytest.skip("this Python cannot be embedded: it has no python3-config (on Debian: python3-dev)")
    out = build("embed/embed.c")
    assert "accesses 1200, last 0x1, run kicked" in out
    if "scripted" in out:
        assert "convert done (0x2000 bytes)" in out


def test_no_example_is_forgotten():
    """Each file is one that is built, or of use to one."""
    files = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.suffix in (".c", ".py", ".pyx")}
    assert files == {"guest.py", "echo.c", "handler_ctypes.py", "handler_cffi.py", "handler_numba.py", "handler_c/echomodule.c",
                     "handler_c/main.py", "handler_cython/echo_cython.pyx", "handler_cython/main.py", "embed/embed.c",
                     "truncated_file.py", "postcopy.py"}  # test_faults.py has the last but one


# ---- what these languages can get wrong ----


def test_a_numba_function_of_another_signature_is_refused(scripted):
    needs("numba")
    import numba

    pointer = numba.types.CPointer(numba.types.uint8)
    for signature in (numba.types.int64(pointer, pointer), numba.types.int32(pointer), numba.types.int32(pointer, numba.types.int64)):
        function = numba.cfunc(signature)((lambda one: 0) if len(signature.args) == 1 else (lambda one, two: 0))
        with pytest.raises(TypeError, match="a handler is a PyCapsule named"):
            scripted.on_pio(1, 1, function)


def test_a_cffi_function_of_another_signature_is_refused(scripted):
    needs("cffi")
    import cffi

    ffi = cffi.FFI()
    for signature in ("long(void *, void *)", "int(void *)", "int(int, void *)", "int(void *, void *, ...)"):
        with pytest.raises(TypeError, match="a handler is a PyCapsule named"):
            scripted.on_pio(1, 1, ffi.cast(signature.replace("(", "(*)(", 1), 1))
    with pytest.raises(TypeError, match="needs the GIL"):
        scripted.on_pio(1, 1, ffi.callback("int(void *, void *)", lambda exit, opaque: 0))
    with pytest.raises(ValueError, match="NULL"):
        native.Function(ffi.cast("int(*)(void *, void *)", 0))


def test_an_owner_is_kept(scripted):
    class Owner:
        pass

    owner = Owner()
    before = sys.getrefcount(owner)
    function = ctypes.CDLL(None)["abs"]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    route = scripted.on_pio(1, 1, native.Function(function, owner=owner))
    assert sys.getrefcount(owner) == before + 1
    assert route.handler.owner is owner
    route.remove()
    del route
    assert sys.getrefcount(owner) == before


WRONG = """
from kvmexit cimport handler
cdef int wrong(int one, void *opaque) noexcept nogil:
    return 0
cdef int raises(void *exit, void *opaque) except -1:
    return 0
handler(wrong)
handler(raises)
"""


def test_a_cython_function_of_another_signature_does_not_compile(tmp_path):
    (tmp_path / "wrong.pyx").write_text(WRONG)
    done = subprocess.run([sys.executable, "-m", "cython", "-3", "-I", Path(kvmexit.__file__).parent.parent, tmp_path / "wrong.pyx"],
                          capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.findall(r"wrong.pyx:(\d+):\d+: Cannot assign type", done.stderr) == ["7", "8"]


def test_postcopy(kvm, uffd):
    done = subprocess.run([sys.executable, EXAMPLES / "postcopy.py", "4"], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True, timeout=100, check=False)  # fmt: skip
    assert done.returncode == 0, done
    assert len(re.findall(r"postcopy: 4 MiB by .* pages/s, the same byte for byte\n", done.stdout)) == 3
