"""Runs a gRPC proxy for TensorFlow Serving that rejects requests of wrong shapes.

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
from .grpc_transport import GrpcTransport, channel_options, size_in_memory
from .signatures import DEFAULT_SIGNATURE
from .tensors import Signature, dtype_name
from .transport import Target

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_UNCHECKED = {
    "/tensorflow.serving.PredictionService/GetModelMetadata",
    "/tensorflow.serving.ModelService/GetModelStatus",
}
# Seconds to cache the signatures of a request without a version: the latest version
# may change.
_LATEST_SECONDS = 1.0
_METADATA_SECONDS = 10.0
_MAX_METADATA_BYTES = 64 * 1024**2
_GRACE_SECONDS = 30

# The errors of `check_request`. A malformed tensor proto raises TypeError or
# OverflowError.
_REFUSALS = (ValueError, TypeError, OverflowError)


def make_front(
    target: str,
    address: str,
    *,
    threads: int = 256,
    max_request_bytes: int = 64 * 1024**2,
) -> tuple[grpc.Server, int]:
    """Makes the gRPC server without starting it.

    The server forwards requests of Predict, GetModelMetadata and GetModelStatus, and
    their responses, unchanged. It does not forward a Predict request whose inputs do
    not match the signature; this request fails with INVALID_ARGUMENT. Other methods
    fail with UNIMPLEMENTED.

    Args:
        target: str, `host:port` of TensorFlow Serving's gRPC.
        address: str, `host:port` to listen on; port 0 picks a free port.
        threads: Positive int, the number of concurrent requests. As many again wait,
            and further ones fail with RESOURCE_EXHAUSTED. Default: 256.
        max_request_bytes: Positive int, the size limit of a request, and of each of its
            tensors in memory. Default: 64 MiB.

    Returns:
        The `grpc.Server` and its port.

    Raises:
        ValueError: If an argument is invalid.
        RuntimeError: If the server cannot listen at the address.
    """
    for name, value in [("threads", threads), ("max_request_bytes", max_request_bytes)]:
        if type(value) is not int or value < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={value!r}"
            )
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(threads, "keras_bnrnn_client.front"),
        handlers=[_Front(target, max_request_bytes)],
        maximum_concurrent_rpcs=2 * threads,
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
    """Checks that the inputs of a request match its signature.

    Args:
        request: `PredictRequest`.
        signatures: Dict from signature name to `Signature`.
        max_bytes: int, the size limit of a tensor in memory.

    Raises:
        ValueError: If the inputs do not match the signature.
        TypeError, OverflowError: If a tensor proto is malformed.
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
            raise ValueError(f"`{key}` must have a known shape. Received: {sizes[:9]}")
        if spec.shape is None and len(sizes) != 2:
            # A server that pads crashes if tensors in a batch differ in rank.
            raise ValueError(f"`{key}` must have rank 2. Received: shape {sizes}")
        if size_in_memory(proto) > max_bytes:
            raise ValueError(
                f"`{key}` must take at most {max_bytes} bytes. Received: shape {sizes}"
            )
        if sizes:
            rows[key] = sizes[0]
    if len(set(rows.values())) > 1 or 0 in rows.values():
        raise ValueError(
            f"Inputs must have one batch size, 1 or more. Received: {rows}"
        )
    # Checks ranks, sizes and values as the client does.
    arrays = {key: tf.make_ndarray(proto) for key, proto in request.inputs.items()}
    signatures[name].fit(arrays)


class _Front(grpc.GenericRpcHandler):
    def __init__(self, target: str, max_request_bytes: int) -> None:
        self._transport = GrpcTransport(target, None, _MAX_METADATA_BYTES)
        # Forwards answers of any size.
        self._channel = grpc.insecure_channel(target, options=channel_options(-1))
        self._max_request_bytes = max_request_bytes
        # Time of the request for the signatures, and the signatures.
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
        except ServingError as error:  # such as NOT_FOUND, from the target
            context.abort(grpc.StatusCode[error.code], error.args[0][:1024])
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
            # A new version with other signatures may be served since.
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
            "Forward gRPC requests to TensorFlow Serving, and reject requests whose "
            "inputs do not match the signature of the model. No TLS."
        ),
    )
    parser.add_argument(
        "--target", required=True, help="HOST:PORT of TensorFlow Serving's gRPC"
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
        help="number of concurrent requests (default %(default)s)",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=int,
        default=64 * 1024**2,
        help="size limit of a request in bytes (default %(default)s)",
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
