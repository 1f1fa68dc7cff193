"""Runs exported versions in a C program that has neither Python nor Keras."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow as tf

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
# To link against a library of a gigabyte takes the usual linker nine seconds, gold one.
LINKER = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []


def build(folder):
    """Compiles `serve_in_c.c`; skips the test where there is no compiler.

    Args:
        folder: Path of a folder for the program and its files.

    Returns:
        Function of a version's path and a list of `(signature, inputs)`, inputs a dict
        of arrays, which gives a list: for each request a dict of arrays, or the
        `tf.errors.OpError` with which it failed. `xla=False` runs it with XLA off.
    """
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    package = pathlib.Path(tf.__file__).parent
    program = folder / "serve_in_c"
    source = pathlib.Path(__file__).with_name("serve_in_c.c")
    (cc,) = package.glob("libtensorflow_cc.so.?")
    (framework,) = package.glob("libtensorflow_framework.so.?")
    subprocess.run(
        [
            *(COMPILER, "-O1", "-Wall", "-Werror", str(source), "-o", str(program)),
            *("-I", tf.sysconfig.get_include(), str(cc), str(framework)),
            *(f"-Wl,-rpath,{package}", *LINKER),
        ],
        check=True,
        timeout=120,
    )

    def run(path, requests, xla=True):
        arguments = []
        for number, (signature, inputs) in enumerate(requests):
            given, answer = (folder / f"{end}{number}" for end in ("input", "output"))
            with given.open("wb") as file:
                for name, x in inputs.items():
                    _write(file, name, np.asarray(x))
            arguments += [signature, given, answer]
        done = subprocess.run(
            [program, path, "on" if xla else "off", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [_read(answer) for answer in arguments[2::3]]

    return run


def _write(file, name, x):
    dtype = tf.as_dtype(x.dtype).as_datatype_enum
    header = map(str, (name, dtype, x.ndim, *x.shape))
    file.write(" ".join(header).encode() + b"\n")
    if x.dtype == object:
        file.writelines(text + b"\n" for text in x.flat)
    else:
        file.write(x.tobytes())


def _read(path):
    with path.open("rb") as file:
        first = file.read(2)
        if first == b"! ":
            code = int(file.readline())
            return tf.errors.OpError(None, None, file.read().decode(), code)
        file.seek(0)
        return dict(iter(lambda: _read_one(file), None))


def _read_one(file):
    line = file.readline()
    if not line:
        return None
    name, dtype, _, *shape = line.decode().split()
    shape = tuple(map(int, shape))
    dtype = np.dtype(tf.as_dtype(int(dtype)).as_numpy_dtype)
    count = int(np.prod(shape))
    x = np.frombuffer(file.read(count * dtype.itemsize), dtype).reshape(shape)
    file.read(1)
    return name, x
