"""Sends requests to TensorFlow Serving's gRPC services."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from .errors import InvalidResponse, make_error, reading, too_large
from .tensors import Metadata, Signature, TensorSpec, VersionStatus
from .transport import Target

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    # The client retries, within the deadline of the whole call.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcTransport:
    """Sends requests over gRPC.

    Args:
        target: str, `host:port`.
        credentials: `grpc.ChannelCredentials`, or `None` for no TLS.
        max_response_bytes: int, the size limit of a response, and of each of its
            tensors in memory.
    """

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        max_response_bytes: int,
    ) -> None:
        self._max_response_bytes = max_response_bytes
        options = channel_options(max_response_bytes)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=options)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(
            self._channel
        )
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def encode(
        self,
        target: Target,
        name: str,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
    ) -> Any:
        request = predict_pb2.PredictRequest(model_spec=_model_spec(target))
        request.model_spec.signature_name = name
        for key, array in inputs.items():
            request.inputs[key].CopyFrom(
                tf.make_tensor_proto(array, tf.as_dtype(signature.inputs[key].dtype))
            )
        return request

    def predict(
        self, request: Any, signature: Signature, seconds: float
    ) -> dict[str, np.ndarray]:
        response = self._call(self._prediction.Predict, request, seconds)
        signature.check_names(response.outputs)
        with reading():
            return {
                key: self._to_array(key, proto, signature.outputs[key])
                for key, proto in response.outputs.items()
            }

    def metadata(self, target: Target, seconds: float) -> Metadata:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=_model_spec(target), metadata_field=["signature_def"]
        )
        response = self._call(self._prediction.GetModelMetadata, request, seconds)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        with reading():
            try:
                found = response.metadata["signature_def"].Unpack(signatures)
            except DecodeError as error:
                raise ValueError(str(error)) from error
            if not found:
                raise ValueError("`metadata` must have a `signature_def`")
            return Metadata(
                response.model_spec.version.value,
                {
                    name: Signature(_specs(info.inputs), _specs(info.outputs))
                    for name, info in signatures.signature_def.items()
                    # Signatures of TensorFlow itself, which requests cannot call.
                    if not name.startswith("__saved_model")
                },
            )

    def status(self, target: Target, seconds: float) -> list[VersionStatus]:
        request = get_model_status_pb2.GetModelStatusRequest(
            model_spec=_model_spec(Target(target.model, target.version, None))
        )
        response = self._call(self._models.GetModelStatus, request, seconds)
        state_name = get_model_status_pb2.ModelVersionStatus.State.Name
        with reading():
            return [
                VersionStatus(
                    status.version,
                    state_name(status.state),
                    _CODE_NAMES.get(status.status.error_code, "UNKNOWN"),
                    status.status.error_message,
                )
                for status in response.model_version_status
            ]

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: Callable[..., Any], request: Any, seconds: float) -> Any:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            code = error.code()
            details = error.details() or ""
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _OURS.search(details):
                raise too_large(self._max_response_bytes) from error
            raise make_error(
                details, code.name, retriable=_is_transient(code, details)
            ) from error

    def _to_array(self, name: str, proto: Any, spec: TensorSpec) -> np.ndarray:
        dtype = tf.as_dtype(proto.dtype).name
        if dtype != spec.dtype:
            raise InvalidResponse(
                f"The output `{name}` must be {spec.dtype}. Received: {dtype}",
                "INTERNAL",
            )
        if size_in_memory(proto) > self._max_response_bytes:
            raise too_large(self._max_response_bytes)
        array: np.ndarray = tf.make_ndarray(proto)
        return array


def channel_options(max_response_bytes: int) -> list[tuple[str, int]]:
    """Returns the options of a channel.

    Args:
        max_response_bytes: int, the size limit of a response; -1: no limit.
    """
    # gRPC stores the option in 32 bits.
    limit = min(max_response_bytes, 2**31 - 1)
    return [*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", limit)]


def size_in_memory(proto: Any) -> int:
    """Returns the bytes that the array of a `TensorProto` takes.

    A small proto can describe a large tensor, since one value can stand for all.

    Raises:
        ValueError: If a size is negative.
    """
    sizes = [dim.size for dim in proto.tensor_shape.dim]
    if min(sizes, default=0) < 0 or len(sizes) > _MAX_RANK:
        raise ValueError(f"A tensor must have sizes from 0 on. Received: {sizes[:9]}")
    size: int = math.prod(sizes) * (tf.as_dtype(proto.dtype).size or _STRING_BYTES)
    return size


# A string takes a reference in a list and one in an array.
_STRING_BYTES = 16

# The largest rank of a tensor in TensorFlow.
_MAX_RANK = 254


def _is_transient(code: grpc.StatusCode, details: str) -> bool:
    """Returns whether the same request may succeed later."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Usually the server has no thread left, which is transient. A message that is
        # too large fails again.
        return not _TOO_LARGE.search(details)
    return code is grpc.StatusCode.UNAVAILABLE


# The message of gRPC about a response that is larger than the option of the channel.
_OURS = re.compile("(CLIENT: Received|Decompressed) message larger than max")

# Messages of gRPC about messages and metadata, and of the local server.
_TOO_LARGE = re.compile("larger than max|size exceeds|must take at most")

_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def _model_spec(target: Target) -> Any:
    spec = model_pb2.ModelSpec(name=target.model)
    if target.version is not None:
        spec.version.value = target.version
    elif target.label is not None:
        spec.version_label = target.label
    return spec


def _specs(infos: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: _spec(info) for name, info in infos.items()}


def _spec(info: Any) -> TensorSpec:
    shape = tf.TensorShape(info.tensor_shape)
    sizes = None if shape.rank is None else tuple(shape.as_list())
    return TensorSpec(tf.as_dtype(info.dtype).name, sizes)
