"""Writes and reads the warm-up requests of a version.

TensorFlow Serving runs these requests when it loads the version. This module does not
import Keras, so that a server can use it.
"""

import pathlib

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

WARMUP_FILE = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
MOST_RECORDS = 1000  # the limit of TensorFlow Serving


def write_warmup(version_directory, requests):
    """Writes warm-up requests to a version's `tf_serving_warmup_requests` file.

    Args:
        version_directory: Path of the SavedModel.
        requests: List of `(signature_name, inputs)`, inputs a dict of arrays.
    """
    path = pathlib.Path(version_directory) / WARMUP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature_name, inputs in requests:
            request = predict_pb2.PredictRequest()
            request.model_spec.signature_name = signature_name
            for name, value in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            log = prediction_log_pb2.PredictionLog(
                predict_log=prediction_log_pb2.PredictLog(request=request)
            )
            writer.write(log.SerializeToString())


def read_warmup(version_directory):
    """Reads the warm-up requests of a version.

    Args:
        version_directory: Path of the SavedModel.

    Yields:
        `PredictionLog`s; none if the version has no warm-up requests.

    Raises:
        tf.errors.DataLossError: If the file is not a TFRecord file.
        tf.errors.InvalidArgumentError: If a record is not a `PredictionLog`, or the
            file has more than 1000 records. The messages are those of TensorFlow
            Serving.
    """
    path = pathlib.Path(version_directory) / WARMUP_FILE
    if not path.exists():
        return
    for index, record in enumerate(tf.data.TFRecordDataset(str(path))):
        if index >= MOST_RECORDS:
            raise tf.errors.InvalidArgumentError(
                None,
                None,
                f"Number of warmup records exceeds the maximum ({MOST_RECORDS}) at "
                f"{path}",
            )
        record = record.numpy()
        try:
            yield prediction_log_pb2.PredictionLog.FromString(record)
        except DecodeError as error:
            raise tf.errors.InvalidArgumentError(
                None,
                None,
                f"Failed to parse warmup record: {record[:40]!r} from {path}",
            ) from error


def replay_warmup(version_directory, signatures):
    """Runs the warm-up requests of a version, as a server does on loading.

    Args:
        version_directory: Path of the SavedModel.
        signatures: The signatures of the loaded model.

    Returns:
        int, the number of requests run.
    """
    count = 0
    for log in read_warmup(version_directory):
        request = log.predict_log.request
        inputs = {
            name: tf.constant(tf.make_ndarray(proto), tf.as_dtype(proto.dtype))
            for name, proto in request.inputs.items()
        }
        signatures[request.model_spec.signature_name](**inputs)
        count += 1
    return count


def checked_requests(warmup, functions):
    """Checks that the user's warm-up requests match their signatures.

    Args:
        warmup: Dict from signature name to a list of requests, each a dict of arrays;
            or a list of requests for `serving_default`.
        functions: Dict from signature name to concrete function.

    Returns:
        List of `(signature_name, inputs)`.

    Raises:
        ValueError: If a request does not match its signature, or there are more than
            1000 requests.
    """
    if not isinstance(warmup, dict):
        warmup = {"serving_default": warmup}
    requests = []
    for name, wanted in warmup.items():
        if name not in functions:
            raise ValueError(
                "`warmup` must name signatures of the export, one of "
                f"{sorted(functions)}. Received: {name!r}"
            )
        if not isinstance(wanted, (list, tuple)):
            raise ValueError(
                "`warmup` must have a list of requests, dicts of arrays, for each "
                f"signature. Received: warmup[{name!r}]={wanted!r}"
            )
        specs = functions[name].structured_input_signature[0]
        specs = {spec.name: spec for spec in specs}
        for index, request in enumerate(wanted):
            requests.append((name, _checked(request, specs, f"{name!r}][{index}")))
    if len(requests) > MOST_RECORDS:
        raise ValueError(
            f"`warmup` must have at most {MOST_RECORDS} requests: TensorFlow Serving "
            f"does not load more. Received: {len(requests)}"
        )
    return requests


def _checked(request, specs, place):
    if not isinstance(request, dict) or set(request) != set(specs):
        found = sorted(request) if isinstance(request, dict) else request
        raise ValueError(
            f"A request in `warmup` must be a dict of arrays for {sorted(specs)}. "
            f"Received: warmup[{place}] with {found!r}"
        )
    arrays = {}
    for name, value in request.items():
        spec = specs[name]
        try:
            array = tf.constant(value, spec.dtype).numpy()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`warmup` must hold {spec.dtype.name} for {name!r}. Received: "
                f"warmup[{place}], which fails with: {error}"
            ) from error
        if not spec.shape.is_compatible_with(np.shape(array)):
            raise ValueError(
                f"`warmup` must hold the shape {spec.shape} for {name!r}. Received: "
                f"warmup[{place}] of shape {np.shape(array)}"
            )
        arrays[name] = array
    return arrays
