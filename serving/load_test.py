"""Runs a load test against TensorFlow Serving or a server with the same API.

Clients in threads send random requests, each client as soon as its last request is
answered. The script compares each response with the response to the same request before
the load. This detects a server that mixes up rows or pads rows wrongly under load.
"""

import argparse
import collections
import json
import pathlib
import sys
import threading
import time

import numpy as np

try:
    import keras_bnrnn_client
except ImportError:  # the package is not installed
    sys.path.insert(0, str(pathlib.Path(__file__).parent / "client"))
    import keras_bnrnn_client

# The number of distinct requests; each is sent many times.
_REQUESTS = 32


def main(argv=None):
    args = _parse(argv)
    rng = np.random.default_rng(args.seed)
    with _client(args) as client:
        client.wait_until_available(args.wait)
        metadata = client.metadata()
        if args.signature not in metadata.signatures:
            print(
                f"error: version {metadata.version} has no signature "
                f"{args.signature!r}; it has {sorted(metadata.signatures)}",
                file=sys.stderr,
            )
            return 1
        signature = metadata.signatures[args.signature]
        requests = [_random_inputs(signature, args, rng) for _ in range(_REQUESTS)]
        expected = [client.predict(inputs, args.signature) for inputs in requests]
        load = _Load(requests, None if args.no_check else expected)
        seconds = _run(load, args)
    report = load.report(seconds, args)
    if args.json:
        print(json.dumps(report))
    else:
        _print(report, metadata.version, args)
    return 1 if report["errors"] or not report["requests"] else 0


class _Load:
    """The requests of the clients, their latencies and their errors."""

    def __init__(self, requests, expected):
        self.requests = requests
        self.expected = expected
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._latencies = []
        self._errors = collections.Counter()

    def send(self, args, seed):
        """Sends requests as one client until `stop` is set."""
        rng = np.random.default_rng([args.seed, seed])
        latencies, errors = [], collections.Counter()
        with _client(args) as client:
            while not self.stop.is_set():
                index = int(rng.integers(len(self.requests)))
                start = time.perf_counter()
                try:
                    answer = client.predict(self.requests[index], args.signature)
                except (keras_bnrnn_client.ServingError, ValueError) as error:
                    errors[getattr(error, "code", type(error).__name__)] += 1
                    continue
                latencies.append(time.perf_counter() - start)
                if self.expected is not None and not _same(
                    answer, self.expected[index], args.tolerance
                ):
                    errors["wrong answer"] += 1
        with self._lock:
            self._latencies += latencies
            self._errors += errors

    def report(self, seconds, args):
        milliseconds = 1e3 * np.array(self._latencies)
        percentiles = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
        return {
            "requests": len(milliseconds),
            "seconds": round(seconds, 3),
            "requests_per_second": round(len(milliseconds) / seconds, 1),
            "rows_per_second": round(len(milliseconds) * args.batch / seconds, 1),
            "milliseconds": {
                name: round(float(np.percentile(milliseconds, percentile)), 3)
                for name, percentile in percentiles.items()
                if len(milliseconds)
            },
            "errors": dict(self._errors),
        }


def _run(load, args):
    threads = [
        threading.Thread(target=load.send, args=(args, index), daemon=True)
        for index in range(args.clients)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(args.seconds)
    load.stop.set()
    for thread in threads:
        # A request ends by its timeout, so this join returns early.
        thread.join(2 * args.timeout + 10)
    return time.perf_counter() - start


def _client(args):
    return keras_bnrnn_client.ServingClient(
        args.model,
        rest_url=args.url,
        grpc_target=args.grpc,
        version=args.version,
        label=args.label,
        timeout=args.timeout,
        # No retries by default, so that the report shows every error.
        retries=args.retries,
        pad_to=args.pad_to,
    )


def _random_inputs(signature, args, rng):
    timesteps = int(rng.integers(args.lengths[0], args.lengths[1] + 1))
    rows = rng.integers(args.lengths[0], timesteps + 1, args.batch)
    rows[0] = timesteps
    inputs = {}
    for name, spec in signature.inputs.items():
        if name in args.input:
            inputs[name] = args.input[name]
        elif name == "lengths":
            inputs[name] = rows
        else:
            sizes = _sizes(spec.shape, args.batch, timesteps)
            inputs[name] = _random_array(name, spec.dtype, sizes, args, rng)
    return inputs


def _sizes(shape, batch, timesteps):
    # For an unknown shape, sends (B,), which `initial_state` accepts.
    shape = (None,) if shape is None else shape
    free = [batch] + [timesteps] * len(shape)
    return [free[i] if size is None else size for i, size in enumerate(shape)]


def _random_array(name, dtype, sizes, args, rng):
    if name == "t":  # the number of frames processed so far
        return np.zeros(sizes, dtype)
    if dtype == "string":
        words = ["one", "of", "a", "few", "short", "words"]
        flat = [
            " ".join(rng.choice(words, args.lengths[0])).encode()
            for _ in range(int(np.prod(sizes)))
        ]
        return np.array(flat, object).reshape(sizes)
    if dtype == "bool":
        return rng.random(sizes) < 0.5
    if "int" in dtype:
        return rng.integers(0, args.max_integer + 1, sizes)
    return rng.normal(size=sizes).astype("float32")


def _same(answer, expected, tolerance):
    if set(answer) != set(expected):
        return False
    for name, wanted in expected.items():
        found = _without_padding(answer[name], wanted.shape)
        if found.shape != wanted.shape:
            return False
        if wanted.dtype.kind != "f":
            if not np.array_equal(found, wanted):
                return False
        elif not np.allclose(found, wanted, tolerance, tolerance, equal_nan=True):
            return False
    return True


def _without_padding(found, shape):
    """Removes trailing zero timesteps, which a server that pads batches returns."""
    if found.ndim > 1 and found.ndim == len(shape) and not found[:, shape[1] :].any():
        return found[:, : shape[1]]
    return found


def _print(report, version, args):
    server = args.url or args.grpc
    print(
        f"{args.model} version {version} at {server}, {args.signature}: "
        f"{args.clients} clients, {args.batch} rows of "
        f"{args.lengths[0]}-{args.lengths[1]} timesteps, {report['seconds']:.1f} s"
    )
    print(f"requests    {report['requests']}")
    print(
        f"throughput  {report['requests_per_second']:.1f} requests/s, "
        f"{report['rows_per_second']:.1f} rows/s"
    )
    latencies = "  ".join(f"{k} {v:.2f}" for k, v in report["milliseconds"].items())
    print(f"latency ms  {latencies or 'none'}")
    errors = ", ".join(f"{kind}: {n}" for kind, n in sorted(report["errors"].items()))
    print(f"errors      {errors or 'none'}")


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="load_test.py",
        description=(
            "Send random requests to a served model from many clients at once. Print "
            "the throughput, latency percentiles and errors by kind. The exit status "
            "is 1 after an error or a wrong answer."
        ),
        epilog=(
            "example: python serving/load_test.py --url http://127.0.0.1:8501 "
            "--model speech --clients 64 --seconds 20 --lengths 5-50. The clients are "
            "threads of one process. If they need more than about one core, they limit "
            "the throughput: run several processes."
        ),
    )
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument(
        "--url", help="URL of the server, http://host:port, to use REST"
    )
    server.add_argument(
        "--grpc", metavar="HOST:PORT", help="address of the server, to use gRPC"
    )
    parser.add_argument("--model", required=True, help="name of the model")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--version", type=int, help="version of the model (default: the latest)"
    )
    which.add_argument("--label", help="label of the version")
    parser.add_argument(
        "--signature",
        default="serving_default",
        help="signature to call (default %(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=_positive_int,
        default=64,
        help="number of concurrent clients (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive_float,
        default=10.0,
        help="duration of the load (default %(default)s)",
    )
    parser.add_argument(
        "--lengths",
        type=_range,
        default=(5, 50),
        metavar="MIN-MAX",
        help="range of the timesteps of a sequence (default 5-50)",
    )
    parser.add_argument(
        "--batch",
        type=_positive_int,
        default=1,
        help="number of rows of a request (default %(default)s)",
    )
    parser.add_argument(
        "--pad-to",
        type=_sizes_to_pad_to,
        metavar="T,T,...",
        help="pad requests to these numbers of timesteps, for a server that batches "
        "requests and does not pad them (default: no padding)",
    )
    parser.add_argument(
        "--max-integer",
        type=int,
        default=9,
        help="largest value of an integer input, such as a token id "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--input",
        type=_input,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="send this value for an input instead of random values; may be repeated",
    )
    parser.add_argument(
        "--timeout",
        type=_positive_float,
        default=10.0,
        help="time limit of a request in seconds (default %(default)s)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        help="number of retries after a transient error (default %(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=_positive_float,
        default=30.0,
        help="seconds to wait until the model is available (default %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="tolerance of the comparison with the answers before the load "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare answers, for random outputs or a changing version",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--smoke", action="store_true", help="run 4 clients for half a second"
    )
    args = parser.parse_args(argv)
    args.input = dict(args.input)
    if args.smoke:
        args.clients, args.seconds = 4, 0.5
    return args


def _positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive. Received: {text}")
    return value


def _positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive. Received: {text}")
    return value


def _range(text):
    low, _, high = text.partition("-")
    try:
        low, high = int(low), int(high or low)
    except ValueError:
        low = 0
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(
            f"must be MIN-MAX, 1 <= MIN <= MAX. Received: {text}"
        )
    return low, high


def _sizes_to_pad_to(text):
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if sizes[0] < 1 or sizes != sorted(set(sizes)):
        raise argparse.ArgumentTypeError(
            f"must be positive integers in ascending order. Received: {text}"
        )
    return sizes


def _input(text):
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be NAME=JSON. Received: {text}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
