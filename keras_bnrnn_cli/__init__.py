"""Runs the command `keras-bnrnn`.

This package imports only the standard library, so that `--help`, `--version` and errors
in the arguments are fast. A command imports `keras_bnrnn`, and with it TensorFlow,
after its arguments are parsed.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator

from keras_bnrnn_cli import arguments

# For each command: the parser of its arguments, its module, and its help text.
_COMMANDS = {
    "serve": (
        arguments.serve,
        "keras_bnrnn.local_server.__main__",
        "serve exported models on this machine, for development and tests "
        "(production is TensorFlow Serving)",
    ),
    "inspect": (
        arguments.inspect,
        "keras_bnrnn.export.inspection",
        "show what an exported model holds: signatures, folded layers, operations",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: List of str, the arguments. `None`: the arguments of the process.

    Returns:
        int, the exit status; 1 if the reader of standard output, such as `head`, closes
        it early.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output again at exit, which would fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 1


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="keras-bnrnn",
        description=(
            "Inspect and serve models that `keras_bnrnn.export_saved_model` wrote."
        ),
        epilog="`keras-bnrnn COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, _, text) in _COMMANDS.items():
        # The command's own parser answers `--help`.
        commands.add_parser(name, help=text, add_help=False)
    argv = sys.argv[1:] if argv is None else list(argv)
    # The command's own parser parses the arguments after the command.
    parse, module, _ = _COMMANDS[parser.parse_args(argv[:1]).command]
    parsed = parse(argv[1:])
    try:
        with _quiet_import():
            command = importlib.import_module(module)
    except ImportError as error:
        # The ImportError of `keras_bnrnn.local_server` names the extra to install.
        print(f"error: {error}", file=sys.stderr)
        return 1
    status: int = command.run(parsed)
    return status


def _version() -> str:
    try:
        return importlib.metadata.version("keras-bnrnn")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Hides TensorFlow's log unless the user set `TF_CPP_MIN_LOG_LEVEL` to 0.

    TensorFlow 2.21 ignores the level while it is imported, so file descriptor 2 is
    redirected for that time.
    """
    # Level 3 also hides C++ errors, such as the message about a missing GPU. Errors
    # that concern the user are raised as Python exceptions as well.
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "0":
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
