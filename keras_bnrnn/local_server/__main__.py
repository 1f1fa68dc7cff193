"""Runs the local server for the command `keras-bnrnn serve NAME=DIR ...`."""

import logging
import signal
import sys
import threading

from keras_bnrnn.local_server.server import ModelServer
from keras_bnrnn_cli import arguments


def main(argv=None):
    return run(arguments.serve(argv))


def run(args):
    """Runs the server until SIGTERM or SIGINT.

    Args:
        args: The namespace that `keras_bnrnn_cli.arguments.serve` returns.

    Returns:
        int, the exit status: 1 if the server cannot start, otherwise 0.
    """
    # Logs loaded and unloaded versions to standard error.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("keras_bnrnn").setLevel(logging.INFO)
    try:
        server = ModelServer(
            dict(args.models),
            host=args.host,
            port=args.port,
            grpc_port=args.grpc_port,
            max_request_bytes=args.max_request_bytes,
            poll_seconds=args.poll_seconds,
            versions=args.versions,
            version_labels=_labels(args.label),
        )
        stopping = threading.Event()
        # Set before the first request, so that a signal cannot lose a request.
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
    if server.grpc_port is not None:
        print(f"serving gRPC at {server.grpc_target}", flush=True)
    print(f"serving metrics at {server.url}/metrics", flush=True)
    stopping.wait()
    server.stop()
    return 0


def _labels(labels):
    version_labels = {}
    for name, label, version in labels:
        version_labels.setdefault(name, {})[label] = version
    return version_labels


if __name__ == "__main__":
    sys.exit(main())
