"""Loads a version of a SavedModel and runs its signatures."""

import contextlib
import logging
import pathlib
import threading

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from keras_bnrnn.local_server import predict

# The import registers the ops of tensorflow-text, which some models use.
with contextlib.suppress(ImportError):
    import tensorflow_text  # noqa: F401

_logger = logging.getLogger(__name__)

_WARMUP_FILE = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
_MAX_WARMUP_RECORDS = 1000


class Servable:
    """A version of a SavedModel, loaded and warmed up.

    The constructor runs the requests in `assets.extra/tf_serving_warmup_requests`, if
    this file exists.

    Args:
        name: str, the name of the model.
        version: int.
        directory: `pathlib.Path` of the SavedModel.

    Attributes:
        name: The name of the model.
        version: The version.
        signatures: Dict from signature name to `SignatureDef`.
        in_flight: int, the number of requests in progress.

    Raises:
        ValueError: If the SavedModel cannot be loaded, or a warm-up request fails.
    """

    def __init__(self, name, version, directory):
        self.name = name
        self.version = version
        self.in_flight = 0
        self._lock = threading.Lock()
        try:
            # Keeps the whole model: signatures do not keep its variables alive.
            self._model = tf.saved_model.load(
                str(directory), tags=[tf.saved_model.SERVING]
            )
            self.signatures = _read_signatures(directory)
            self._warm_up(directory / _WARMUP_FILE)
        # The loader raises many kinds of errors for a broken SavedModel.
        except Exception as error:
            raise ValueError(
                f"The SavedModel of `{name}` cannot be loaded. "
                f"Received: directory={str(directory)!r}, which fails with: {error}"
            ) from error

    def predict(self, signature_name, inputs):
        """Runs a signature.

        Args:
            signature_name: str, a name in `signatures`.
            inputs: Dict from input name to array or tensor, with the dtypes and shapes
                of the signature.

        Returns:
            Dict from output name to array. Strings are bytes in an array of objects.

        Raises:
            tf.errors.OpError: If the model fails.
        """
        with self._lock:
            self.in_flight += 1
        try:
            infos = self.signatures[signature_name].inputs
            tensors = {
                name: tf.convert_to_tensor(value, infos[name].dtype)
                for name, value in inputs.items()
            }
            outputs = self._model.signatures[signature_name](**tensors)
            return {name: tensor.numpy() for name, tensor in outputs.items()}
        finally:
            with self._lock:
                self.in_flight -= 1

    def _warm_up(self, path):
        if not path.exists():
            return
        count = 0
        for record in _read_records(path):
            count += 1
            if count > _MAX_WARMUP_RECORDS:
                raise predict.invalid_argument(
                    "Number of warmup records exceeds the maximum "
                    f"({_MAX_WARMUP_RECORDS}) at {path}"
                )
            self._replay(record, path)
        _logger.info(
            "%s version %s: %s warm-up requests", self.name, self.version, count
        )

    def _replay(self, record, path):
        try:
            log = prediction_log_pb2.PredictionLog.FromString(record)
        except DecodeError as error:
            raise predict.invalid_argument(
                f"Failed to parse warmup record: {record[:40]!r} from {path}"
            ) from error
        kind = log.WhichOneof("log_type")
        if kind != "predict_log":
            _logger.warning("%s: a record of %s is not replayed", path, kind)
            return
        request = log.predict_log.request
        name, signature = predict.find_signature(request, self.signatures)
        predict.filter_outputs(request, signature)
        # 2**31 bytes: the size limit of a proto.
        self.predict(name, predict.read_inputs(request, signature, 2**31))


def find_versions(base_directory):
    """Finds the versions under a model's base directory.

    Args:
        base_directory: str or path.

    Returns:
        Dict from version, an int, to its directory, in ascending order. Ignores files,
        and directories whose name is not a non-negative int64, as TensorFlow Serving
        does.

    Raises:
        OSError: If `base_directory` is not a directory.
    """
    versions = {
        int(path.name): path
        for path in pathlib.Path(base_directory).iterdir()
        if path.name.isascii() and path.name.isdigit() and path.is_dir()
    }
    # TensorFlow Serving reads the names as int64.
    versions = {v: path for v, path in versions.items() if v < 2**63}
    return dict(sorted(versions.items()))


def _read_signatures(directory):
    content = (directory / "saved_model.pb").read_bytes()
    for meta_graph in saved_model_pb2.SavedModel.FromString(content).meta_graphs:
        if tf.saved_model.SERVING in meta_graph.meta_info_def.tags:
            return dict(meta_graph.signature_def)
    raise ValueError(f"no graph is tagged `{tf.saved_model.SERVING}`")


def _read_records(path):
    try:
        for record in tf.data.TFRecordDataset(str(path)):
            yield record.numpy()
    except tf.errors.DataLossError as error:
        # TensorFlow Serving loads such a version as well.
        _logger.warning("%s is not a file of TFRecords: %s", path, error.message)
