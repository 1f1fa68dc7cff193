"""Sends requests to TensorFlow Serving's gRPC services."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from .errors import make_error
from .tensors import Metadata, Signature, TensorSpec, VersionStatus
from .transport import Target

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
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
    """

    def __init__(
        self, target: str, credentials: grpc.ChannelCredentials | None
    ) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(
                target, credentials, options=CHANNEL_OPTIONS
            )
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
        response = _call(self._prediction.Predict, request, seconds)
        return {key: tf.make_ndarray(proto) for key, proto in response.outputs.items()}

    def metadata(self, target: Target, seconds: float) -> Metadata:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=_model_spec(target), metadata_field=["signature_def"]
        )
        response = _call(self._prediction.GetModelMetadata, request, seconds)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
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
        response = _call(self._models.GetModelStatus, request, seconds)
        state_name = get_model_status_pb2.ModelVersionStatus.State.Name
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


def _call(method: Callable[..., Any], request: Any, seconds: float) -> Any:
    try:
        return method(request, timeout=seconds)
    except grpc.RpcError as error:
        code = error.code()
        details = error.details() or ""
        raise make_error(
            details, code.name, retriable=_is_transient(code, details)
        ) from error


def _is_transient(code: grpc.StatusCode, details: str) -> bool:
    """Returns whether the same request may succeed later."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Usually the server has no thread left, which is transient. A message that is
        # too large fails again.
        return not _TOO_LARGE.search(details)
    return code is grpc.StatusCode.UNAVAILABLE


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
