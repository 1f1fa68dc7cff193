"""Prepares folded models for the converters of Keras and explains their errors."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_bnrnn.backend.context import simple_loops
from keras_bnrnn.export.comparison import ExportMismatchError
from keras_bnrnn.export.structure import nested_inputs
from keras_bnrnn.traversal import clone_graph, copy_of, sublayers


@contextlib.contextmanager
def without_warnings_of_libraries() -> Iterator[None]:
    """Silences the NumPy 2 warnings that Keras causes and a user cannot avoid.

    Does not silence other warnings, which may concern the model.
    """
    with warnings.catch_warnings():
        # Keras' conversion of variables to arrays.
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        # Keras' patch of tf2onnx, which checks for `np.object`.
        message = r"In the future `np\.object` will be defined"
        warnings.filterwarnings("ignore", message, FutureWarning)
        yield


class NamedModel:
    """A copy of a folded model that takes and returns dicts of named tensors.

    Args:
        folded: A folded model.
        interface: The `Interface` of the folded model.
        batch_size: Int, or `None` for a free batch size.
        copy: Function from a layer of `folded` to a copy of the layer.
    """

    def __init__(self, folded, interface, batch_size, copy):
        model = clone_graph(folded, clone_function=copy)
        model.set_weights(folded.get_weights())
        inputs, self._specs = {}, {}
        for name, x in interface.inputs.items():
            shape = (batch_size, *x.shape[1:])
            self._specs[name] = tf.TensorSpec(shape, x.dtype, name=name)
            inputs[name] = keras.Input(batch_shape=shape, dtype=x.dtype, name=name)
        outputs = keras.tree.flatten(model(nested_inputs(model, list(inputs.values()))))
        self._model = keras.Model(
            inputs, dict(zip(interface.per_step, outputs, strict=True))
        )

    def export(self, file, **options):
        """Writes a file with `keras.Model.export`.

        Args:
            file: `pathlib.Path`.
            **options: Further arguments of `keras.Model.export`, such as `format`.
        """
        with simple_loops():
            self._model.export(
                file, verbose=False, input_signature=[self._specs], **options
            )


def prepared_copy(layer):
    """Copies a layer and adapts the copy to the converters."""
    clone = copy_of(layer)
    if not isinstance(clone, keras.layers.Layer):
        return clone
    for part in sublayers(clone):
        if hasattr(part, "use_cudnn"):
            # If a GPU is visible, the traced graph would contain a cuDNN operation.
            part.use_cudnn = False
        if type(part) is keras.layers.TimeDistributed:
            _run_on_all_frames(part)
    return clone


def _run_on_all_frames(layer):
    """Makes a `TimeDistributed` apply its layer to all frames as one batch.

    Both converters return wrong numbers for `TimeDistributed`'s loop over a free T.
    """
    own_call = layer.call
    takes_mask = "mask" in inspect.signature(layer.layer.call).parameters

    def call(inputs, training=None, mask=None):
        sizes = inputs.shape[2:]
        if None in sizes or (takes_mask and mask is not None):
            return own_call(inputs, training=training, mask=mask)
        y = layer.layer(keras.ops.reshape(inputs, (-1, *sizes)))
        shape = (*keras.ops.shape(inputs)[:2], *keras.ops.shape(y)[1:])
        return keras.ops.reshape(y, shape)

    layer.call = call


@contextlib.contextmanager
def explaining(format_name):
    """Raises a ValueError that explains an error of a converter or a runtime."""
    try:
        yield
    except (ExportMismatchError, OSError):
        raise
    except Exception as error:
        cause = str(error).strip().split("\n")[0]
        if "loc(" in cause:  # LiteRT's converter puts a long location first
            cause = cause.rpartition("): ")[2]
        raise ValueError(
            f"`model` must not contain a layer that {format_name} has no operation for "
            "or that its converter cannot convert. Nothing was published. Received: "
            f"{type(error).__name__}: {cause[:300]}"
        ) from error
