"""Finds layers that make masks, drop masks, or reverse the order of frames."""

import keras

from keras_bnrnn.traversal import sublayers


def makes_masks(model):
    """Returns whether a layer of a model makes a mask from its input values."""
    return any(
        isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
        for layer in sublayers(model)
    )


def reverses_time(model):
    """Returns the name of a layer that reverses its output frames, or `None`.

    After such a layer, padding comes before the valid frames.
    """
    parts = sublayers(model)
    # `Bidirectional` restores the order of its backward layer's frames.
    ordered = {
        id(inner)
        for layer in parts
        if isinstance(layer, keras.layers.Bidirectional)
        for inner in (layer.forward_layer, layer.backward_layer)
    }
    for layer in parts:
        if (
            isinstance(layer, keras.layers.RNN)
            and layer.go_backwards
            and layer.return_sequences
            and id(layer) not in ordered
        ):
            return layer.name
    return None


def destroys_masks(model):
    """Returns the name of a layer that drops the mask of its input, or `None`.

    After such a layer, padding counts as frames.
    """
    for layer in _operations(model):
        if isinstance(layer, (keras.layers.InputLayer, keras.layers.Embedding)):
            continue
        if _computes_mask(layer):
            continue
        if isinstance(layer, keras.Model):
            name = destroys_masks(layer)
            if name is not None:
                return name
        elif _takes_sequences(layer) and not getattr(layer, "supports_masking", False):
            return layer.name
    return None


def _operations(model):
    return model.layers if isinstance(model, keras.Sequential) else model.operations


def _computes_mask(operation):
    """Returns whether an operation of a Functional model computes a mask.

    A Functional model records the operations that compute the mask of a layer, such as
    `Masking`.
    """
    if isinstance(operation, keras.layers.Layer):
        return False
    return all(y.dtype == "bool" for y in keras.tree.flatten(operation.output))


def _takes_sequences(layer):
    try:
        return any(len(x.shape) > 2 for x in keras.tree.flatten(layer.input))
    except (AttributeError, ValueError):  # the layer is called several times
        return True
