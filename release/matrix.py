"""Runs fast tests on each supported Python, TensorFlow and Keras.

`oldest` installs the lowest versions that pyproject.toml allows, `newest` the highest.
Each combination has an environment of its own, in which the checkout is installed.
Downloads packages. An interpreter is searched for by its name, such as `python3.12`,
and with `uv`, if this is installed.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

from environments import (
    ROOT,
    CheckError,
    Environment,
    copy_of_checkout,
    work_folder,
)

# Every part of the package once: layers, statistics, folding, files and the export.
TESTS = [
    "tests/test_layout.py",
    "tests/test_calibration.py",
    "tests/test_folding.py",
    "tests/test_saved_answers.py",
    "tests/layers/test_new_cell.py",
    "tests/layers/test_keras_rnn.py",
    "tests/recurrence/test_gradients.py",
    "tests/export/test_export.py",
    "tests/typing",
]
# What these tests need beside the package. Others are skipped.
EXTRAS = "serving,client"
TOOLS = ["pytest", "pytest-xdist"]
SETS = ("oldest", "newest")


def main(argv=None):
    pythons = supported_pythons(read_project())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python",
        nargs="*",
        choices=pythons,
        default=pythons,
        metavar="VERSION",
        help=f"of {', '.join(pythons)} (default: all)",
    )
    parser.add_argument(
        "--versions",
        nargs="*",
        choices=SETS,
        default=SETS,
        help="of TensorFlow and Keras (default: both)",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out a Python that is not installed, instead of failing",
    )
    parser.add_argument(
        "--tests", nargs="*", default=TESTS, help="what to run (default: a fast part)"
    )
    arguments = parser.parse_args(argv)
    failed = []
    for version in arguments.python:
        interpreter = find_interpreter(version)
        if interpreter is None:
            print(f"Python {version}: not installed", flush=True)
            if not arguments.skip_missing:
                failed.append(f"Python {version}")
            continue
        for versions in arguments.versions:
            name = f"Python {version}, {versions} TensorFlow and Keras"
            try:
                result = run_tests(interpreter, versions, arguments.tests)
                print(f"{name}: {result}", flush=True)
            except CheckError as error:
                print(f"{name}: failed\n{error}", flush=True)
                failed.append(name)
    if failed:
        print(f"error: failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def read_project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def supported_pythons(project):
    """Lists the versions of Python in the classifiers, such as `"3.11"`."""
    found = (
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name)
        for name in project["project"]["classifiers"]
    )
    return [match[1] for match in found if match]


def pins_of(project, versions):
    """Lists the requirements that choose the versions of a set.

    Args:
        project: Dict, the content of pyproject.toml.
        versions: `"oldest"` or `"newest"`.

    Returns:
        List of requirements, such as `"tensorflow==2.20.*"`. For `"newest"`, those of
        pyproject.toml: pip takes the highest that they allow.
    """
    requirements = project["project"]["dependencies"]
    if versions == "newest":
        return list(requirements)
    pins = []
    for requirement in requirements:
        match = re.fullmatch(r"([\w-]+)>=(\d+\.\d+),<.*", requirement)
        if match is None:
            raise CheckError(
                "A dependency must be NAME>=X.Y,<Z, so that its oldest version is "
                f"known. Received: {requirement}"
            )
        pins.append(f"{match[1]}=={match[2]}.*")
    return pins


def find_interpreter(version):
    """Returns the path of an interpreter, or `None`."""
    if version == "{}.{}".format(*sys.version_info):
        return sys.executable
    found = shutil.which(f"python{version}")
    # A shim of pyenv is there for each version, also for those that are not selected.
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    if shutil.which("uv"):
        command = ["uv", "python", "find", "--no-project", version]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def run_tests(interpreter, versions, tests):
    """Installs the checkout and runs tests.

    Returns:
        str: the versions, and the last line of pytest.

    Raises:
        CheckError: If an installation or a test fails.
    """
    with work_folder() as folder:
        source = copy_of_checkout(pathlib.Path(folder) / "source")
        environment = Environment(pathlib.Path(folder) / "environment", interpreter)
        pins = pins_of(read_project(), versions)
        environment.install(f"{source}[{EXTRAS}]", *pins, *TOOLS)
        code = (
            "import keras, tensorflow as tf; print(tf.__version__, keras.__version__)"
        )
        found = environment.run(["python", "-c", code]).split()
        command = ["python", "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"]
        output = environment.run([*command, *tests], cwd=source)
        last = output.strip().splitlines()[-1]
        return f"TensorFlow {found[0]}, Keras {found[1]}: {last}"


if __name__ == "__main__":
    sys.exit(main())
