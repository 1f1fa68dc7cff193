"""Loads a version of a SavedModel and runs its signatures."""

import contextlib
import logging
import threading

import tensorflow as tf

from keras_bnrnn.export.operations import saved_model_proto
from keras_bnrnn.export.warmup import WARMUP_FILE, read_warmup
from keras_bnrnn.local_server import predict

# The import registers the ops of tensorflow-text, which some models use.
with contextlib.suppress(ImportError):
    import tensorflow_text  # noqa: F401

_logger = logging.getLogger(__name__)


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
            self._warm_up(directory)
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

    def _warm_up(self, directory):
        count = 0
        for log in _read_logs(directory):
            count += 1
            kind = log.WhichOneof("log_type")
            if kind == "predict_log":
                self._replay(log.predict_log.request)
            else:
                path = directory / WARMUP_FILE
                _logger.warning("%s: a record of %s is not replayed", path, kind)
        if count:
            _logger.info(
                "%s version %s: %s warm-up requests", self.name, self.version, count
            )

    def _replay(self, request):
        name, signature = predict.find_signature(request, self.signatures)
        predict.filter_outputs(request, signature)
        # 2**31 bytes: the size limit of a proto.
        self.predict(name, predict.read_inputs(request, signature, 2**31))


def _read_signatures(directory):
    for meta_graph in saved_model_proto(directory).meta_graphs:
        if tf.saved_model.SERVING in meta_graph.meta_info_def.tags:
            return dict(meta_graph.signature_def)
    raise ValueError(f"no graph is tagged `{tf.saved_model.SERVING}`")


def _read_logs(directory):
    try:
        yield from read_warmup(directory)
    except tf.errors.DataLossError as error:
        # TensorFlow Serving loads such a version as well.
        path = directory / WARMUP_FILE
        _logger.warning("%s is not a file of TFRecords: %s", path, error.message)
