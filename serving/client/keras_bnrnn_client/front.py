"""A gRPC server before TensorFlow Serving that refuses requests of wrong shapes.

python -m keras_bnrnn_client.front --target 127.0.0.1:8500 --listen 0.0.0.0:8510
"""

import argparse
import concurrent.futures
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import predict_pb2

from .errors import ServingError
from .grpc_transport import CHANNEL_OPTIONS, GrpcTransport
from .signatures import DEFAULT_SIGNATURE
from .tensors import Signature, dtype_name
from .transport import Target

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_UNCHECKED = {
    "/tensorflow.serving.PredictionService/GetModelMetadata",
    "/tensorflow.serving.ModelService/GetModelStatus",
}
# A request without a version may be for a newer one than a moment ago.
_LATEST_SECONDS = 1.0
_METADATA_SECONDS = 10.0
_GRACE_SECONDS = 30

# What `check_request` raises; all but ValueError is of a proto that is no tensor.
_REFUSALS = (ValueError, TypeError, OverflowError)


def make_front(
    target: str,
    address: str,
    *,
    threads: int = 256,
    max_request_bytes: int = 64 * 1024**2,
) -> tuple[grpc.Server, int]:
    """Makes the gRPC server, which is not started.

    It forwards Predict, GetModelMetadata and GetModelStatus, requests and answers
    unchanged. A Predict request whose inputs do not fit the signature is answered with
    INVALID_ARGUMENT and not forwarded. Other methods are UNIMPLEMENTED.

    Args:
        target: str, `host:port` of TensorFlow Serving's gRPC.
        address: str, `host:port` to listen on; port 0 picks a free one.
        threads: positive int, requests at a time.
        max_request_bytes: positive int, the largest request, and the most that one of
            its tensors may take in memory.

    Returns:
        The server and its port.

    Raises:
        ValueError: for an argument out of range.
        RuntimeError: if it cannot listen at the address.
    """
    for name, value in [("threads", threads), ("max_request_bytes", max_request_bytes)]:
        if type(value) is not int or value < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={value!r}"
            )
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(threads, "keras_bnrnn_client.front"),
        handlers=[_Front(target, max_request_bytes)],
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    return server, server.add_insecure_port(address)


def check_request(
    request: Any, signatures: Mapping[str, Signature], max_bytes: int
) -> None:
    """Checks that the inputs of a request fit the signature that it names.

    Args:
        request: `PredictRequest`.
        signatures: dict of signature name -> `Signature`.
        max_bytes: int, the most that a tensor may take in memory.

    Raises:
        ValueError: if they do not.
    """
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    if name not in signatures:
        raise ValueError(
            f"`signature_name` must be one of {sorted(signatures)}. Received: {name!r}"
        )
    specs, rows = signatures[name].inputs, {}
    if set(request.inputs) != set(specs):
        raise ValueError(
            f"Inputs must have the names {sorted(specs)}. "
            f"Received: {sorted(request.inputs)}"
        )
    for key, spec in specs.items():
        proto = request.inputs[key]
        dtype = dtype_name(types_pb2.DataType.Name(proto.dtype))
        if dtype != spec.dtype:
            raise ValueError(f"`{key}` must be {spec.dtype}. Received: {dtype}")
        sizes = [dim.size for dim in proto.tensor_shape.dim]
        if proto.tensor_shape.unknown_rank or min(sizes, default=0) < 0:
            raise ValueError(f"`{key}` must have a known shape. Received: {sizes}")
        if spec.shape is None and len(sizes) != 2:
            # Two ranks in one batch end a server that pads.
            raise ValueError(f"`{key}` must have rank 2. Received: shape {sizes}")
        # A few bytes may stand for many elements.
        if math.prod(sizes) * max(tf.as_dtype(proto.dtype).size, 1) > max_bytes:
            raise ValueError(
                f"`{key}` must take at most {max_bytes} bytes. Received: shape {sizes}"
            )
        if sizes:
            rows[key] = sizes[0]
    if len(set(rows.values())) > 1 or 0 in rows.values():
        raise ValueError(
            f"Inputs must have one batch size, 1 or more. Received: {rows}"
        )
    # The checks of the client: ranks, sizes, values.
    arrays = {key: tf.make_ndarray(proto) for key, proto in request.inputs.items()}
    signatures[name].fit(arrays)


class _Front(grpc.GenericRpcHandler):
    def __init__(self, target: str, max_request_bytes: int) -> None:
        self._transport = GrpcTransport(target, None)
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._max_request_bytes = max_request_bytes
        # (model, version, label) -> when it was asked for, and the signatures.
        self._known: dict[Target, tuple[float, Mapping[str, Signature]]] = {}

    def service(self, details: Any) -> Any:
        if details.method == _PREDICT:
            return grpc.unary_unary_rpc_method_handler(self._predict)
        if details.method in _UNCHECKED:
            return grpc.unary_unary_rpc_method_handler(self._forward(details.method))
        return None

    def _predict(self, content: bytes, context: Any) -> bytes:
        try:
            request = predict_pb2.PredictRequest.FromString(content)
            self._check(request, context.time_remaining())
        except ServingError as error:  # of the server behind, which has no such model
            context.abort(grpc.StatusCode[error.code], error.args[0])
        except (*_REFUSALS, DecodeError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:1024])
        return self._forward(_PREDICT)(content, context)

    def _check(self, request: Any, seconds: float | None) -> None:
        spec = request.model_spec
        which = spec.WhichOneof("version_choice")
        target = Target(
            spec.name,
            spec.version.value if which == "version" else None,
            spec.version_label if which == "version_label" else None,
        )
        asked, signatures = self._known.get(target, (-math.inf, {}))
        is_current = target.version is not None
        if not signatures or (
            not is_current and time.monotonic() - asked > _LATEST_SECONDS
        ):
            signatures = self._fetch(target, seconds)
            is_current = True
        try:
            check_request(request, signatures, self._max_request_bytes)
        except _REFUSALS:
            # A version with other signatures may have taken over since.
            latest = signatures if is_current else self._fetch(target, seconds)
            if latest == signatures:
                raise
            check_request(request, latest, self._max_request_bytes)

    def _fetch(self, target: Target, seconds: float | None) -> Mapping[str, Signature]:
        asked = time.monotonic()
        seconds = min(_METADATA_SECONDS, seconds or _METADATA_SECONDS)
        metadata = self._transport.metadata(target, seconds)
        self._known[target] = asked, metadata.signatures
        return metadata.signatures

    def _forward(self, method: str) -> Callable[[bytes, Any], bytes]:
        call = self._channel.unary_unary(method)

        def forward(content: bytes, context: Any) -> bytes:
            try:
                answer: bytes = call(content, timeout=context.time_remaining())
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            return answer

        return forward


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keras_bnrnn_client.front",
        description=(
            "Pass gRPC requests on to TensorFlow Serving, and refuse those whose "
            "inputs do not fit the model's signature. Without TLS."
        ),
    )
    parser.add_argument(
        "--target", required=True, help="TensorFlow Serving's gRPC, HOST:PORT"
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8510",
        help="address to listen on, HOST:PORT (default %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=256,
        help="requests at a time (default %(default)s)",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=int,
        default=64 * 1024**2,
        help="refuse larger requests (default %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        server, port = make_front(
            args.target,
            args.listen,
            threads=args.threads,
            max_request_bytes=args.max_request_bytes,
        )
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    server.start()
    print(f"checking requests on port {port} for {args.target}", flush=True)
    stopping.wait()
    server.stop(_GRACE_SECONDS).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
