"""The local server as a command: `python -m keras_bnrnn.serving NAME=DIR ...`."""

import argparse
import signal
import sys
import threading

from keras_bnrnn.serving.server import ModelServer


def main(argv=None):
    args = _parse(argv)
    try:
        server = ModelServer(dict(args.models), host=args.host, port=args.port)
        stopping = threading.Event()
        # Before the first request is taken, so that none is lost to a signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        server.start()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for servable in server.servables.values():
        print(
            f"serving {servable.name} version {servable.version} at "
            f"{server.url}/v1/models/{servable.name}",
            flush=True,
        )
    stopping.wait()
    server.stop()
    return 0


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m keras_bnrnn.serving",
        description=(
            "Serve SavedModels on this machine over TensorFlow Serving's REST API. "
            "For development and tests: production is TensorFlow Serving, which "
            "answers the same requests."
        ),
        epilog=(
            "example: python -m keras_bnrnn.serving speech=exported/speech, then POST "
            '{"instances": [...]} to http://127.0.0.1:8501/v1/models/speech:predict. '
            "Ctrl-C or SIGTERM stops it once the requests in flight are answered."
        ),
    )
    parser.add_argument(
        "models",
        nargs="+",
        type=_model,
        metavar="NAME=DIR",
        help="a model's name and its base directory, which has a sub-directory for "
        "each version (1, 2, ...); the highest is served",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8501,
        help="port to listen on, 0 for a free one (default %(default)s)",
    )
    args = parser.parse_args(argv)
    names = [name for name, _ in args.models]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"each NAME must be given once. Received: {name} twice")
    return args


def _model(text):
    name, separator, directory = text.partition("=")
    if not (name and separator and directory):
        raise argparse.ArgumentTypeError(f"must be NAME=DIR. Received: {text}")
    return name, directory


if __name__ == "__main__":
    sys.exit(main())
