"""Checks arguments for `export_saved_model`, `export_litert` and `export_onnx`."""

import os

from keras_bnrnn.traversal import sublayers


def refuse_stateful(model, advice=""):
    """Raises ValueError if a model has a stateful layer.

    Args:
        model: A Keras model.
        advice: str, a sentence to add to the error message.
    """
    for layer in sublayers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                "`model` must not have a stateful layer, which would pass the state of "
                "one request to the next. Rebuild the model with `stateful=False` and "
                f"set its weights. {advice}"
                f"Received: layer {layer.name!r} with stateful=True"
            )


def check_path(name, path):
    """Raises ValueError if an argument is neither a string nor a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"`{name}` must be a string or a path. Received: {name}={path!r}"
        )


def check_quantize(quantize):
    """Raises ValueError if `quantize` is neither `None` nor `"float16"`."""
    if quantize not in (None, "float16"):
        raise ValueError(
            f"`quantize` must be None or 'float16'. Received: quantize={quantize!r}"
        )
