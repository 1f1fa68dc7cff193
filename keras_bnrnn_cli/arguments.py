"""Parses the arguments of each command. Imports only the standard library."""

import argparse
import pathlib


def serve(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of `keras-bnrnn serve`.

    Args:
        argv: List of str, the arguments. `None`: the arguments of the process.

    Returns:
        `argparse.Namespace`.
    """
    parser = argparse.ArgumentParser(
        prog="keras-bnrnn serve",
        description=(
            "Serve SavedModels on this machine over TensorFlow Serving's REST and "
            "gRPC. This server is for development and tests: production is TensorFlow "
            "Serving, which answers the same requests."
        ),
        epilog=(
            "example: keras-bnrnn serve speech=exported/speech, then POST "
            '{"instances": [...]} to http://127.0.0.1:8501/v1/models/speech:predict. '
            "The server also loads versions that are exported while it runs. Ctrl-C "
            "or SIGTERM stops the server after the requests in progress."
        ),
    )
    parser.add_argument(
        "models",
        nargs="+",
        type=_model,
        metavar="NAME=DIR",
        help="the name of a model and its base directory, which has a sub-directory "
        "for each version (1, 2, ...)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8501,
        help="port of REST and metrics, 0 for any free port (default %(default)s)",
    )
    parser.add_argument(
        "--grpc-port",
        type=_grpc_port,
        default=8500,
        help="port of gRPC, 0 for any free port, `none` for no gRPC "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--versions",
        type=_versions,
        default="latest",
        metavar="latest|N|all",
        help="serve the highest version of a model, the N highest, or all versions "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--label",
        type=_label,
        action="append",
        default=[],
        metavar="NAME/LABEL=N",
        help="let requests name version N of a model by a label, as in "
        "/v1/models/speech/labels/stable:predict; may be repeated",
    )
    parser.add_argument(
        "--poll-seconds",
        type=float,
        default=1.0,
        help="seconds between two searches for new and removed versions, 0 to search "
        "only at the start (default %(default)s)",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=int,
        default=64 * 1024**2,
        help="size limit of a request in bytes (default %(default)s)",
    )
    args = parser.parse_args(argv)
    names = [name for name, _ in args.models]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"each NAME must be given once. Received: {name} twice")
    return args


def _model(text: str) -> tuple[str, str]:
    name, separator, directory = text.partition("=")
    if not (name and separator and directory):
        raise argparse.ArgumentTypeError(f"must be NAME=DIR. Received: {text}")
    return name, directory


def _grpc_port(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a port or `none`. Received: {text}")
    return int(text)


def _versions(text: str) -> int | str:
    if text in ("latest", "all"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be `latest`, `all` or a number. Received: {text}"
        )
    return int(text)


def _label(text: str) -> tuple[str, str, int]:
    name, _, rest = text.partition("/")
    label, _, version = rest.partition("=")
    if not (name and label and version.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be NAME/LABEL=N. Received: {text}")
    return name, label, int(version)


def inspect(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of `keras-bnrnn inspect`.

    Args:
        argv: List of str, the arguments. `None`: the arguments of the process.

    Returns:
        `argparse.Namespace`.
    """
    parser = argparse.ArgumentParser(
        prog="keras-bnrnn inspect",
        description="Print the signatures, layers, operations and sizes of a "
        "SavedModel. The exit status is 1 if stock TensorFlow Serving cannot run it.",
    )
    parser.add_argument(
        "directory",
        type=pathlib.Path,
        metavar="DIR",
        help="directory of a version, or of a model to inspect its highest version",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )
    return parser.parse_args(argv)
