"""Implements TensorFlow Serving's gRPC services for the local model server."""

import concurrent.futures
import functools
import logging

import grpc
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_bnrnn.local_server import predict

_logger = logging.getLogger(__name__)

# More threads than cores, since threads wait for TensorFlow.
_THREADS = 32

# Requests that run or wait for a thread; further ones fail with RESOURCE_EXHAUSTED.
_MAX_REQUESTS = 256


def make_server(models, metrics, address, max_request_bytes):
    """Makes a gRPC server without starting it.

    Args:
        models: `Models`.
        metrics: `Metrics`.
        address: str, `host:port`; port 0 picks a free port.
        max_request_bytes: int, the size limit of a request; a larger request fails with
            RESOURCE_EXHAUSTED.

    Returns:
        The `grpc.Server` and its port.

    Raises:
        OSError: If the server cannot listen at the address.
    """
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(
            _THREADS, "keras_bnrnn.local_server.grpc"
        ),
        interceptors=[_Parser()],
        maximum_concurrent_rpcs=_MAX_REQUESTS,
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", -1),
            # Otherwise a second server could listen at the same port.
            ("grpc.so_reuseport", 0),
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        _PredictionService(models, metrics, max_request_bytes), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        _ModelService(models, metrics), server
    )
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen at {address}: {error}") from error
    return server, port


def _answered(method):
    """Wraps a service method: counts requests, and turns errors into gRPC statuses."""

    @functools.wraps(method)
    def answer(self, request, context):
        with self.metrics.request("grpc", method.__name__) as record:
            try:
                if isinstance(request, DecodeError):
                    raise predict.invalid_argument(
                        f"The request cannot be parsed: {request}"
                    )
                response = method(self, request, record)
                record.status = grpc.StatusCode.OK.name
                return response
            except tf.errors.OpError as error:
                code, details = _STATUS_CODES[error.error_code], error.message
            except Exception as error:
                _logger.exception("A %s request failed", method.__name__)
                code = grpc.StatusCode.INTERNAL
                details = f"{type(error).__name__}: {error}"
            record.status = code.name
        context.abort(code, predict.shorten(details))

    return answer


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models, metrics, max_request_bytes):
        self.models = models
        self.metrics = metrics
        self.max_request_bytes = max_request_bytes

    @_answered
    def Predict(self, request, record):
        _require_model_spec(request)
        servable = self.models.find(request.model_spec, record)
        name, signature = predict.find_signature(request, servable.signatures)
        record.signature = name
        inputs = predict.read_inputs(request, signature, self.max_request_bytes)
        wanted = predict.filter_outputs(request, signature)
        outputs = servable.predict(name, inputs)
        response = predict_pb2.PredictResponse()
        _fill_model_spec(response.model_spec, servable)
        response.model_spec.signature_name = name
        for output in wanted:
            predict.write_tensor(outputs[output], response.outputs[output])
        return response

    @_answered
    def GetModelMetadata(self, request, record):
        _require_model_spec(request)
        if not request.metadata_field:
            raise predict.invalid_argument(
                "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != "signature_def":
                raise predict.invalid_argument(
                    f"Metadata field {field} is not supported"
                )
        servable = self.models.find(request.model_spec, record)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        _fill_model_spec(response.model_spec, servable)
        signatures = get_model_metadata_pb2.SignatureDefMap(
            signature_def=servable.signatures
        )
        response.metadata["signature_def"].Pack(signatures)
        return response

    @_answered
    def Classify(self, request, record):
        raise _unimplemented("Classify")

    @_answered
    def Regress(self, request, record):
        raise _unimplemented("Regress")

    @_answered
    def MultiInference(self, request, record):
        raise _unimplemented("MultiInference")


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models, metrics):
        self.models = models
        self.metrics = metrics

    @_answered
    def GetModelStatus(self, request, record):
        _require_model_spec(request)
        return self.models.status(request.model_spec, record)

    @_answered
    def HandleReloadConfigRequest(self, request, record):
        raise _unimplemented("HandleReloadConfigRequest")


class _Parser(grpc.ServerInterceptor):
    """Passes the error of a malformed request to the service method.

    The method then fails with INVALID_ARGUMENT. Without this interceptor, gRPC itself
    would report INTERNAL.
    """

    def intercept_service(self, continuation, handler_call_details):
        handler = continuation(handler_call_details)
        if handler is None:
            return None

        def parse(content):
            try:
                return handler.request_deserializer(content)
            except DecodeError as error:
                return error

        return grpc.unary_unary_rpc_method_handler(
            handler.unary_unary, parse, handler.response_serializer
        )


# TensorFlow and gRPC use the same numbers for error codes.
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _require_model_spec(request):
    if not request.HasField("model_spec"):
        raise predict.invalid_argument("Missing ModelSpec")


def _fill_model_spec(model_spec, servable):
    model_spec.name = servable.name
    model_spec.version.value = servable.version


def _unimplemented(method):
    return tf.errors.UnimplementedError(
        None,
        None,
        f"The local server does not implement {method}; TensorFlow Serving does",
    )
