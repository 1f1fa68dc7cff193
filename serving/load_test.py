"""A load test for TensorFlow Serving, and for servers that speak as it does.

Clients in threads send random requests as fast as they are answered, and each answer is
compared with the one that the same request had alone, before the load: a server that
mixes up or pads rows wrongly under load is found out.
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
except ImportError:  # in a checkout that is not installed
    sys.path.insert(0, str(pathlib.Path(__file__).parent / "client"))
    import keras_bnrnn_client

# Distinct requests; each is sent many times.
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
    """What the clients send, and what became of it."""

    def __init__(self, requests, expected):
        self.requests = requests
        self.expected = expected
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._latencies = []
        self._errors = collections.Counter()

    def send(self, args, seed):
        """A client: sends requests until it is told to stop."""
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
        # One that never ends would have passed its deadline long ago.
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
        # What is lost under load is to be seen.
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
    # Any shape: a batch of values, as `initial_state` is content with.
    shape = (None,) if shape is None else shape
    free = [batch] + [timesteps] * len(shape)
    return [free[i] if size is None else size for i, size in enumerate(shape)]


def _random_array(name, dtype, sizes, args, rng):
    if name == "t":  # how many frames came before
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
    """A server that batches requests answers with the timesteps of the longest."""
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
            "Send random requests to a served model from many clients at once; print "
            "throughput, the percentiles of latency, and errors by kind. The exit "
            "status is 1 if there was an error or a wrong answer."
        ),
        epilog=(
            "example: python serving/load_test.py --url http://127.0.0.1:8501 "
            "--model speech --clients 64 --seconds 20 --lengths 5-50. The clients are "
            "threads of one process: where they need more than about one core, the "
            "figures are theirs and not the server's, so start several."
        ),
    )
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--url", help="server over REST, http://host:port")
    server.add_argument("--grpc", metavar="HOST:PORT", help="server over gRPC")
    parser.add_argument("--model", required=True, help="the model's name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, help="its version (default: the latest)")
    which.add_argument("--label", help="the label of its version")
    parser.add_argument(
        "--signature",
        default="serving_default",
        help="the signature to call (default %(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=_positive_int,
        default=64,
        help="requests in flight (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive_float,
        default=10.0,
        help="how long (default %(default)s)",
    )
    parser.add_argument(
        "--lengths",
        type=_range,
        default=(5, 50),
        metavar="MIN-MAX",
        help="timesteps of a sequence (default 5-50)",
    )
    parser.add_argument(
        "--batch",
        type=_positive_int,
        default=1,
        help="rows of a request (default %(default)s)",
    )
    parser.add_argument(
        "--pad-to",
        type=_sizes_to_pad_to,
        metavar="T,T,...",
        help="have the client pad requests to these numbers of timesteps, as a server "
        "needs that batches and does not pad (default: none)",
    )
    parser.add_argument(
        "--max-integer",
        type=int,
        default=9,
        help="the largest value of an integer input, such as a token "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--input",
        type=_input,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="send this value for an input instead of random ones; may be repeated",
    )
    parser.add_argument(
        "--timeout",
        type=_positive_float,
        default=10.0,
        help="seconds that a request may take (default %(default)s)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        help="send a request again after an error that may pass (default %(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=_positive_float,
        default=30.0,
        help="seconds to wait for the model at first (default %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="how far an answer may be from that without load (default %(default)s)",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="compare no answers: for random outputs, or a version that changes",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--smoke", action="store_true", help="4 clients for half a second"
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
