"""Checks the wheel and the source distribution as a user gets them.

Builds both from a copy of the tracked files, checks their contents and metadata,
installs them into empty environments, imports them without and with each extra, and
follows the README from `pip install` to a trained model. Downloads packages.

    release/check.py --light   one environment; extras that need no other TensorFlow
    release/check.py           one environment for each extra, some 20 minutes
"""

import argparse
import pathlib
import re
import sys
import tarfile
import time
import tomllib
import zipfile

from environments import (
    ROOT,
    CheckError,
    Environment,
    copy_of_checkout,
    work_folder,
)

# Of the tools that no other environment needs.
TOOLS = ["build==1.6.1", "twine==7.0.0"]

# Seconds that `import keras_bnrnn` may take after `import keras`.
IMPORT_SECONDS = 0.3

MODEL = """
import keras, tempfile
from keras_bnrnn import BNLSTM
model = keras.Sequential([keras.Input((None, 3), name="x"), BNLSTM(4)])
path = tempfile.mkdtemp() + "/model"
"""
MISSING = """
try:
    {statement}
except ImportError as error:
    assert "{expected}" in str(error), error
else:
    raise AssertionError("no ImportError: {expected}")
"""
# What must run with the extra alone, and what must fail without it.
RUNS = {
    "text": "import tensorflow_text, keras_hub",
    "serving": "from keras_bnrnn.local_server import ModelServer",
    "client": "from keras_bnrnn_client import ServingClient\n"
    "ServingClient('m', rest_url='http://127.0.0.1:1').close()",
    "litert": f"{MODEL}from keras_bnrnn.export import export_litert\n"
    "export_litert(model, path + '.tflite')",
    "onnx": f"{MODEL}from keras_bnrnn.export import export_onnx\n"
    "export_onnx(model, path + '.onnx')",
    "plots": f"{MODEL}import numpy as np\n"
    "from keras_bnrnn import NormalizationMonitor\n"
    "from keras_bnrnn.plots import plot_normalization\n"
    "monitor = NormalizationMonitor(np.ones((8, 5, 3)), log_dir=path)\n"
    "model.compile('sgd', 'mse')\n"
    "model.fit(np.ones((8, 5, 3)), np.ones((8, 4)), callbacks=[monitor])\n"
    "plot_normalization(monitor).savefig(path + '.png')",
    "examples": "import matplotlib, sklearn, tensorboard, tensorflow_text, uvicorn",
    "dev": "import pytest, xdist, nbclient, yaml, mypy, onnx, ai_edge_litert",
}
FAILS = {
    "serving": MISSING.format(
        statement="import keras_bnrnn.local_server", expected="keras-bnrnn[serving]"
    ),
    "client": MISSING.format(
        statement="from keras_bnrnn_client import ServingClient; "
        "ServingClient('m', rest_url='http://127.0.0.1:1')",
        expected="pip install httpx",
    ),
    "litert": MODEL
    + MISSING.format(
        statement="from keras_bnrnn.export import export_litert; "
        "export_litert(model, path + '.tflite')",
        expected="keras-bnrnn[litert]",
    ),
    "plots": "import numpy as np\n"
    + MISSING.format(
        statement="from keras_bnrnn import NormalizationMonitor; "
        "NormalizationMonitor(np.ones((8, 5, 3)), log_dir='logs')",
        expected="keras-bnrnn[plots]",
    )
    + "from keras_bnrnn import Recalibrate\n"
    + MISSING.format(
        statement="from keras_bnrnn.plots import plot_recalibration; "
        "plot_recalibration(Recalibrate(np.ones((8, 5, 3))))",
        expected="keras-bnrnn[plots]",
    ),
    "onnx": MODEL
    + MISSING.format(
        statement="from keras_bnrnn.export import export_onnx; "
        "export_onnx(model, path + '.onnx')",
        expected="keras-bnrnn[onnx]",
    ),
}
LIGHT = ["client", "serving"]
# As in pyproject.toml, for a program outside the checkout.
MYPY = ["--strict", "--ignore-missing-imports", "--allow-subclassing-any"]


def main(argv=None):
    arguments = parse_arguments(argv)
    started = time.monotonic()

    def report(text):
        print(f"{time.monotonic() - started:5.0f} s  {text}", flush=True)

    try:
        with work_folder() as folder:
            check(pathlib.Path(folder), arguments, report)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report("the release can be installed and used")
    return 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--light",
        action="store_true",
        help=f"one environment, and only the extras {', '.join(LIGHT)}",
    )
    parser.add_argument(
        "--extras",
        nargs="*",
        choices=sorted(RUNS),
        metavar="EXTRA",
        help=f"only these, of {', '.join(sorted(RUNS))} (default: all)",
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the interpreter of the environments (default: the one that runs)",
    )
    parser.add_argument(
        "--dist", type=pathlib.Path, help="folder to copy the checked files to"
    )
    arguments = parser.parse_args(argv)
    if arguments.extras is None:
        arguments.extras = LIGHT if arguments.light else list(RUNS)
    return arguments


def check(folder, arguments, report):
    source = copy_of_checkout(folder / "source")
    tools = Environment(folder / "tools", arguments.python)
    tools.install(*TOOLS)
    # The wheel is built from the source distribution, which must be complete.
    tools.run(["python", "-m", "build", "--outdir", str(folder / "dist"), str(source)])
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    tools.run(["twine", "check", "--strict", str(wheel), str(sdist)])
    check_wheel(wheel)
    check_sdist(sdist)
    report(f"built and checked {wheel.name}, {sdist.name}")

    base = Environment(folder / "base", arguments.python)
    follow_readme(base, source)
    report("a model trains as in the README, after `pip install` into nothing")
    base.install("--force-reinstall", "--no-deps", wheel)
    check_base(base)
    seconds = import_seconds(base)
    report(f"import keras_bnrnn after import keras: {seconds:.2f} s, without output")
    if seconds > IMPORT_SECONDS:
        raise CheckError(
            f"`import keras_bnrnn` must take at most {IMPORT_SECONDS} s after `import "
            f"keras`. Received: {seconds:.2f} s"
        )
    for extra in arguments.extras:
        environment = base
        if not arguments.light:
            environment = Environment(folder / extra, arguments.python)
        environment.install(f"{wheel}[{extra}]")
        environment.run(["python", "-c", RUNS[extra]])
        report(f"installed and imported [{extra}]")
        if extra == "dev":
            program = source / "tests/typing/typical_use.py"
            environment.run(["mypy", *MYPY, str(program)])
            report("the types of the installed package pass `mypy --strict`")
    if arguments.dist:
        arguments.dist.mkdir(parents=True, exist_ok=True)
        for path in (wheel, sdist):
            (arguments.dist / path.name).write_bytes(path.read_bytes())


def check_wheel(path):
    """Checks the files of a wheel.

    Raises:
        CheckError: If a file is missing, or is not one of the package.
    """
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
    packages = ("keras_bnrnn", "keras_bnrnn_cli", "keras_bnrnn_client")
    wanted = {f"{name}/{file}" for name in packages for file in FILES_OF_PACKAGE}
    (information,) = {n.partition("/")[0] for n in names if ".dist-info/" in n}
    wanted |= {f"{information}/{name}" for name in FILES_OF_INFORMATION}
    if missing := wanted - names:
        raise CheckError(f"{path.name} must have {sorted(missing)}")
    strays = {
        name
        for name in names
        if not re.fullmatch(rf"({'|'.join(packages)})/(\w+/)*(\w+\.py|py\.typed)", name)
        and not name.startswith(f"{information}/")
    }
    if strays:
        raise CheckError(f"{path.name} must have only modules. Found {sorted(strays)}")


FILES_OF_PACKAGE = ("__init__.py", "py.typed")
FILES_OF_INFORMATION = ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")


def check_sdist(path):
    """Checks the files of a source distribution.

    Raises:
        CheckError: If it has no licence, tests or `py.typed`, or a compiled file.
    """
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile"}
    wanted |= {"CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "requirements.txt"}
    wanted |= {"tests/conftest.py", "keras_bnrnn/py.typed"}
    if missing := wanted - names:
        raise CheckError(f"{path.name} must have {sorted(missing)}")
    strays = {
        n
        for n in names
        if re.search(r"\.py[cod]$|saved_model\.pb$|/\.(?!gitignore)", n)
    }
    if strays:
        raise CheckError(f"{path.name} must not have {sorted(strays)}")


def follow_readme(environment, source):
    """Runs the first commands and the first program of the README, as printed.

    Args:
        environment: `Environment` without packages.
        source: The checkout, in which the README's `pip install` runs.

    Raises:
        CheckError: If one fails, or no epoch is trained.
    """
    command, program = first_steps((source / "README.md").read_text(encoding="utf-8"))
    environment.run(command, cwd=source, shell=True)
    script = environment.folder / "readme.py"
    script.write_text(program, encoding="utf-8")
    output = environment.run(["python", str(script)])
    if "Epoch 1/" not in output or "loss" not in output:
        raise CheckError(f"The README's program must train. Received: {output}")


def first_steps(readme):
    """Finds the README's command that installs the package, and its first program.

    Args:
        readme: str, the text of the README.

    Returns:
        Two str: the first block of shell commands that has `pip install`, and the first
        block of Python.

    Raises:
        CheckError: If there is none.
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.M | re.S)
    installing = [text for language, text in blocks if language == "sh"]
    installing = [text for text in installing if "pip install" in text]
    programs = [text for language, text in blocks if language == "python"]
    if not installing or not programs:
        raise CheckError(
            "README.md must have a block `sh` with `pip install` and a block `python`"
        )
    return installing[0], programs[0]


def check_base(environment):
    """Checks the package without extras.

    Raises:
        CheckError: If the version is wrong, the command fails, or something that needs
            an extra does not name the extra.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    code = f"import keras_bnrnn; assert keras_bnrnn.__version__ == {version!r}"
    environment.run(["python", "-c", code])
    printed = environment.run(["keras-bnrnn", "--version"]).strip()
    if printed != f"keras-bnrnn {version}":
        raise CheckError(f"`keras-bnrnn --version` must print {version}: {printed}")
    for code in FAILS.values():
        environment.run(["python", "-c", code])


IMPORT = """
import sys, time
import keras
for stream in (sys.stdout, sys.stderr):
    print("begin", file=stream, flush=True)
start = time.perf_counter()
import keras_bnrnn
seconds = time.perf_counter() - start
for stream in (sys.stdout, sys.stderr):
    print("end", file=stream, flush=True)
print(seconds)
"""


def import_seconds(environment, tries=3):
    """Measures `import keras_bnrnn` after `import keras`.

    Args:
        environment: `Environment` with the package.
        tries: Int, the number of processes. The first one also compiles.

    Returns:
        float, the seconds of the fastest.

    Raises:
        CheckError: If the import prints or logs something.
    """
    command = f"python -c '{IMPORT}' 2>&1"
    fastest = float("inf")
    for _ in range(tries):
        # Both streams in one, to see where a line of a library stands.
        output = environment.run(command, shell=True, env={"TF_CPP_MIN_LOG_LEVEL": "0"})
        between = output.rpartition("begin\n")[2].partition("end\n")[0]
        if between:
            raise CheckError(f"`import keras_bnrnn` must print nothing: {between}")
        fastest = min(fastest, float(output.split()[-1]))
    return fastest


if __name__ == "__main__":
    sys.exit(main())
