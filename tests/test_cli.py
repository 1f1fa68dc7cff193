"""The command `keras-bnrnn`: its help, its messages, and how it runs a command."""

import importlib.metadata
import os
import pathlib
import runpy
import subprocess
import sys
import tomllib
import types

import pytest

import keras_bnrnn
import keras_bnrnn_cli as cli

ROOT = pathlib.Path(__file__).parents[1]
HELP = """\
usage: keras-bnrnn [-h] [--version] COMMAND ...

Inspect and serve models that `keras_bnrnn.export_saved_model` wrote.

positional arguments:
  COMMAND
    serve     serve exported models on this machine, for development and tests
              (production is TensorFlow Serving)
    inspect   show what an exported model holds: signatures, folded layers,
              operations

options:
  -h, --help  show this help message and exit
  --version   show program's version number and exit

`keras-bnrnn COMMAND --help` explains a command.
"""


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Restores the log level; no Keras session needs to be cleared."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture
def commands(monkeypatch):
    """Replaces the modules of the commands by records of their calls."""
    calls = []
    for command, (_, module, _) in cli._COMMANDS.items():

        def run(args, command=command):
            calls.append((command, args, os.environ["TF_CPP_MIN_LOG_LEVEL"]))
            return 7

        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(run=run))
    return calls


def run_script(*arguments):
    """Runs the installed script; returns its status, output, errors and imports."""
    script = pathlib.Path(sys.executable).with_name("keras-bnrnn")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80"},
    )
    lines = done.stderr.splitlines()
    imports = {
        line.rpartition("|")[2].strip() for line in lines if line.startswith("import ")
    }
    errors = [line for line in lines if not line.startswith("import time:")]
    return done.returncode, done.stdout, errors, imports


@pytest.mark.parametrize(
    ("arguments", "status", "output", "errors"),
    [
        (["--help"], 0, HELP, []),
        (["--version"], 0, f"keras-bnrnn {keras_bnrnn.__version__}\n", []),
        (["serve", "--help"], 0, None, []),
        (["inspect", "--help"], 0, None, []),
        (
            ["inspect"],
            2,
            "",
            [
                "usage: keras-bnrnn inspect [-h] [--json] DIR",
                "keras-bnrnn inspect: error: the following arguments are required: DIR",
            ],
        ),
    ],
)
def test_help_and_version_are_silent_and_import_no_tensorflow(
    arguments, status, output, errors
):
    found = run_script(*arguments)
    assert found[0] == status
    if output is None:
        assert found[1].startswith(f"usage: keras-bnrnn {arguments[0]} [-h]")
    else:
        assert found[1] == output
    assert found[2] == errors
    assert {"keras_bnrnn_cli", "argparse"} <= found[3]
    # What makes an import slow. The standard library and the command itself are left.
    packages = {name.partition(".")[0] for name in found[3]}
    assert not packages & {"keras_bnrnn", "tensorflow", "keras", "numpy", "uvicorn"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["serve", "m"], "argument NAME=DIR: must be NAME=DIR. Received: m"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_mistakes_in_arguments(argv, words, commands, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err
    assert not commands


def test_a_command_gets_its_parsed_arguments(commands):
    assert cli.main(["serve", "m=dir", "--port", "0", "--label", "m/a=1"]) == 7
    assert cli.main(["inspect", "dir", "--json"]) == 7
    (serve, served, _), (inspect, inspected, _) = commands
    assert (serve, inspect) == ("serve", "inspect")
    assert served.models == [("m", "dir")]
    assert served.port == 0
    assert served.label == [("m", "a", 1)]
    assert (inspected.directory, inspected.json) == (pathlib.Path("dir"), True)


def test_arguments_of_the_process(commands, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["keras-bnrnn", "inspect", "dir"])
    assert cli.main() == 7
    assert commands[0][1].directory == pathlib.Path("dir")


def test_the_package_runs_as_a_module(commands, monkeypatch):
    """`python -m keras_bnrnn_cli` exits with the status of the command."""
    monkeypatch.setattr(sys, "argv", ["keras-bnrnn", "inspect", "dir"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("keras_bnrnn_cli", run_name="__main__")
    assert exit_info.value.code == 7


@pytest.mark.parametrize(("given", "level"), [(None, "3"), ("0", "0"), ("1", "1")])
def test_a_log_level_of_the_user_stays(commands, monkeypatch, given, level):
    if given is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    else:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", given)
    cli.main(["inspect", "dir"])
    assert commands[0][2] == level


@pytest.mark.parametrize("level", ["0", "1", "3"])
def test_the_log_of_an_import_is_hidden(level, tmp_path, monkeypatch, capfd):
    # As TensorFlow does: a write to the file descriptor, past `sys.stderr`.
    (tmp_path / "noisy_command.py").write_text(
        "import os, sys\n"
        "os.write(2, b'I0000 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "def run(args):\n"
        "    print('output')\n"
        "    print('a message', file=sys.stderr)\n"
        "    os.write(2, b'an error of C++\\n')\n"
        "    return 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noisy_command", raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    parse = cli._COMMANDS["inspect"][0]
    monkeypatch.setitem(cli._COMMANDS, "inspect", (parse, "noisy_command", ""))
    assert cli.main(["inspect", "dir"]) == 0
    output, errors = capfd.readouterr()
    assert output == "output\n"
    shown = "I0000 port.cc:153] oneDNN custom operations are on.\n"
    expected = "a message\nan error of C++\n"
    assert errors == (shown if level == "0" else "") + expected


@pytest.mark.parametrize("module", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_extra_is_one_line(module, monkeypatch, capfd):
    for name in [name for name in sys.modules if "keras_bnrnn.local_server" in name]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # an import of it raises
    assert cli.main(["serve", "m=dir"]) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert module in line.partition("an import failed: ")[2]
    assert line.endswith("Install them with `pip install 'keras-bnrnn[serving]'`.")


# A command that prints as many lines as its `DIR` says.
PRINTS = """
import sys, types
import keras_bnrnn_cli as cli

def run(args):
    print("line\\n" * int(str(args.directory)))
    return 0

_, module, _ = cli._COMMANDS["inspect"]
sys.modules[module] = types.SimpleNamespace(run=run)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments",
    # Output that fits the buffer fails when it is flushed, other output before.
    [["inspect", "1"], ["inspect", "100000"], ["inspect", "--help"], ["--help"]],
)
def test_a_reader_that_leaves_early_ends_it_quietly(arguments, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert keras_bnrnn.__version__ == project["version"]
    (script,) = importlib.metadata.entry_points(
        group="console_scripts", name="keras-bnrnn"
    )
    assert script.value == "keras_bnrnn_cli:main"
