"""Defines `fold`, which replaces normalised layers by stock Keras layers."""

import contextlib
import inspect
import typing
import warnings

import keras
from keras import ops

from keras_bnrnn.layers.cell import BNCell, changed_methods
from keras_bnrnn.layers.rnn import BNRNN
from keras_bnrnn.sequence_batch_norm import (
    SequenceBatchNorm,
    warn_of_nonfinite_batches,
)
from keras_bnrnn.traversal import (
    clone_graph,
    copy_of,
    has_graph,
    require_built_graph,
    sublayers,
)


class FoldedLayer(typing.NamedTuple):
    """Reports how `fold` treated one normalised layer.

    Attributes:
        name: The name of the layer.
        layer: The class of the layer, such as `"BNLSTM"`.
        folded_into: The class of the stock layer that replaces it, or `None`.
        kept_because: Why the layer was kept and frozen. `None` if it was folded.
    """

    name: str
    layer: str
    folded_into: str | None
    kept_because: str | None


@typing.overload
def fold(
    model: keras.Model, return_report: typing.Literal[False] = False
) -> keras.Model: ...


@typing.overload
def fold(
    model: keras.Model, return_report: typing.Literal[True]
) -> tuple[keras.Model, list[FoldedLayer]]: ...


@typing.overload
def fold(
    model: keras.Model, return_report: bool
) -> keras.Model | tuple[keras.Model, list[FoldedLayer]]: ...


def fold(
    model: keras.Model, return_report: bool = False
) -> keras.Model | tuple[keras.Model, list[FoldedLayer]]:
    """Returns a model of stock Keras layers that equals `model(x, training=False)`.

    With its population statistics, batch normalisation is an affine map of the
    input projection: `W' = W * gamma / sqrt(variance + epsilon)`,
    `b' = beta - mean * gamma / sqrt(variance + epsilon)`. Each `BNLSTM`, `BNGRU` and
    `BNSimpleRNN` is replaced by the stock layer with these weights, each of their cells
    by the stock cell, and each `SequenceBatchNorm` by a `BatchNormalization`. In the
    recurrent layers normalisation then takes no time. The folded layers are for
    inference: they have no dropout, regularizers or constraints.

    Args:
        model: A built Sequential or Functional model. It may contain shared layers,
            nested models, `Bidirectional`, `TimeDistributed`, `keras.layers.RNN` and
            `StackedRNNCells`. It is not changed.
        return_report: Whether to return the list of `FoldedLayer` as well. Default:
            `False`.

    Returns:
        The folded model, or `(folded, report)` with `return_report`. Layers keep their
        names. The folded model is compiled like `model`, if the optimizer, losses and
        metrics are part of Keras or registered with Keras. Its optimizer creates its
        variables only when the folded model trains.

        A layer that cannot fold is kept and frozen, and a warning names it. A layer
        cannot fold if it has peepholes, if it is inside a user-defined layer, or if the
        subclass of the layer or its cell overrides a method of the equations: `step`,
        `loop_kernel`, `call`, `inner_loop`, `build`, `own_weights` or `folded_weights`.

        Outputs agree to 1e-5 for inputs whose mean is not large compared with their
        deviation. Both models compute in float32, which rounds a pre-activation by
        about 1e-7 of the largest term in its sum. For inputs with mean 1e4 and
        deviation 1 both models are accurate to 1e-3.

    Raises:
        ValueError: If `model` is subclassed or not built.

    Example:

    >>> model = keras.Sequential([keras.Input((None, 8)), BNLSTM(4, name="lstm")])
    >>> [type(layer).__name__ for layer in fold(model).layers]
    ['LSTM']
    """
    require_built_graph(model, "`fold`")
    warn_of_nonfinite_batches(
        part for part in sublayers(model) if isinstance(part, SequenceBatchNorm)
    )
    report = []
    folded = _folded_graph(model, report)
    if not folded.built:
        folded.build([x.shape for x in model.inputs])
    _copy_weights(model, folded)
    if model.compiled and type(model).compile is keras.Model.compile:
        # A loss or metric that is not registered with Keras cannot be deserialized.
        with contextlib.suppress(TypeError, ValueError):
            config = keras.saving.deserialize_keras_object(model.get_compile_config())
            # Not `compile_from_config`, which creates the variables of the optimizer:
            # inference does not need them, and training creates them when it starts.
            folded.compile(**config)
    kept = [entry for entry in report if entry.kept_because is not None]
    if kept:
        warnings.warn(
            "Not folded, kept frozen: "
            + "; ".join(f"{e.name} ({e.layer}): {e.kept_because}" for e in kept),
            stacklevel=2,
        )
    return (folded, report) if return_report else folded


# Arguments that only matter in training; reset after folding.
INFERENCE = {
    "use_bias": True,
    "dropout": 0.0,
    "recurrent_dropout": 0.0,
    "kernel_regularizer": None,
    "recurrent_regularizer": None,
    "bias_regularizer": None,
    "kernel_constraint": None,
    "recurrent_constraint": None,
    "bias_constraint": None,
}


def _folded_graph(model, report):
    """Clones a model with folded layers in place of its layers."""
    inputs = None
    if not isinstance(model, keras.Sequential):
        layers = {id(x.output): x for x in model.layers if _is_input(x)}
        inputs = keras.tree.map_structure(
            lambda x: _copy_of_input(layers[id(x)]), model.input
        )
    return clone_graph(
        model,
        input_tensors=inputs,
        clone_function=lambda layer: _folded(layer, report),
    )


def _copy_of_input(layer):
    """Copies an input, with the name of the layer and the name of the tensor."""
    x = layer.output
    tensor = keras.KerasTensor(
        x.shape, x.dtype, sparse=x.sparse, ragged=x.ragged, name=x.name
    )
    return keras.layers.InputLayer(
        input_tensor=tensor, optional=layer.optional, name=layer.name
    ).output


def _is_input(layer):
    return isinstance(layer, keras.layers.InputLayer)


def _folded(layer, report):
    """Returns the layer that replaces `layer`, not built yet."""
    if isinstance(layer, keras.Model) and has_graph(layer):
        return _folded_graph(layer, report)
    if not _holds_normalization(layer):
        return copy_of(layer)
    if isinstance(layer, (BNRNN, BNCell, SequenceBatchNorm)):
        if reason := _why_not(layer):
            return _kept(layer, report, reason)
        stock = _stock_norm if isinstance(layer, SequenceBatchNorm) else _stock
        return _noted(layer, report, stock(layer))

    config = layer.get_config()
    if type(layer) is keras.layers.Bidirectional:
        forward = _folded(layer.forward_layer, report)
        backward = _folded(layer.backward_layer, report)
        config["layer"] = keras.saving.serialize_keras_object(forward)
        config["backward_layer"] = keras.saving.serialize_keras_object(backward)
    elif type(layer) is keras.layers.TimeDistributed:
        inner = _folded(layer.layer, report)
        config["layer"] = keras.saving.serialize_keras_object(inner)
    elif type(layer) is keras.layers.StackedRNNCells:
        config["cells"] = [
            keras.saving.serialize_keras_object(_folded(cell, report))
            for cell in layer.cells
        ]
    elif type(layer) is keras.layers.RNN:
        cell = _folded(layer.cell, report)
        config["cell"] = keras.saving.serialize_keras_object(cell)
    else:
        reason = f"fold cannot see how {type(layer).__name__} calls what it holds"
        return _kept(layer, report, reason)
    return type(layer).from_config(config)


def _holds_normalization(layer):
    return isinstance(layer, keras.layers.Layer) and any(
        isinstance(part, (BNCell, SequenceBatchNorm)) for part in sublayers(layer)
    )


def _copy_weights(layer, clone):
    """Copies weights and states from `layer` to the built `clone`, folded if needed."""
    if isinstance(layer, keras.Model) and has_graph(layer):
        clones = {part.name: part for part in clone.layers}
        for part in layer.layers:
            if not _is_input(part):
                _copy_weights(part, clones[part.name])
    elif not _holds_normalization(layer) or _makes(layer) == _makes(clone):
        clone.set_weights(layer.get_weights())
        for part, copied in zip(sublayers(layer), sublayers(clone), strict=False):
            _copy_states(part, copied)
    elif isinstance(layer, SequenceBatchNorm):
        affine = [w for w in (layer.gamma, layer.beta) if w is not None]
        weights = [*affine, layer.moving_mean, layer.moving_variance]
        clone.set_weights([ops.convert_to_numpy(w) for w in weights])
    elif isinstance(layer, BNCell):
        _copy_folded_weights(layer, clone)
    else:
        _copy_parts(layer, clone)


def _copy_parts(layer, clone):
    """Copies the weights of a stock layer that contains other layers."""
    if isinstance(layer, keras.layers.Bidirectional):
        _copy_weights(layer.forward_layer, clone.forward_layer)
        _copy_weights(layer.backward_layer, clone.backward_layer)
    elif isinstance(layer, keras.layers.TimeDistributed):
        _copy_weights(layer.layer, clone.layer)
    elif isinstance(layer, keras.layers.StackedRNNCells):
        for cell, stock_cell in zip(layer.cells, clone.cells, strict=True):
            _copy_weights(cell, stock_cell)
    else:
        _copy_weights(layer.cell, clone.cell)
        _copy_states(layer, clone)


def _makes(layer):
    return [type(part) for part in sublayers(layer)]


def _copy_states(layer, clone):
    """Copies the states of a stateful layer."""
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
        states, copied = (keras.tree.flatten(x.states) for x in (layer, clone))
        for state, copied_state in zip(states, copied, strict=True):
            copied_state.assign(state)


def _copy_folded_weights(cell, stock_cell):
    weights = cell.stock_weights(cell.folded_weights())
    stock_cell.set_weights([ops.convert_to_numpy(w) for w in weights])


def _stock(layer):
    stock = getattr(layer, _declaration(layer))
    # A stock layer has no arguments of subclasses or of normalisation.
    known = {"name", "trainable", "dtype", *inspect.signature(stock).parameters}
    if isinstance(layer, BNRNN):
        known |= set(inspect.signature(keras.layers.RNN).parameters)
    config = {**layer.get_config(), **INFERENCE}
    config = {name: value for name, value in config.items() if name in known}
    if "activity_regularizer" in config:
        config["activity_regularizer"] = None
    if config.get("go_backwards"):
        # Keras' unrolled loop masks reversed outputs by the mask in forward order.
        config["unroll"] = False
    return stock.from_config(config)


def _stock_norm(layer):
    return keras.layers.BatchNormalization(
        epsilon=layer.epsilon,
        momentum=layer.momentum,
        center=layer.center,
        scale=layer.scale,
        name=layer.name,
        dtype=layer.dtype_policy,
    )


def _declaration(layer):
    """Returns the name of the attribute that holds the stock class."""
    return "stock_cell" if isinstance(layer, BNCell) else "stock_layer"


def _why_not(layer):
    """Returns why a normalised layer or cell cannot fold, or `None` if it can."""
    parts = [layer, layer.cell] if isinstance(layer, BNRNN) else [layer]
    for part in parts:
        declaration = _declaration(part)
        if getattr(part, declaration) is None:
            return f"no stock layer has the equations of {type(part).__name__}"
        if own := changed_methods(part, declaration):
            return f"it has its own {', '.join(own)}"
        if isinstance(part, BNCell) and (reason := part.why_not_stock()):
            return reason
    return None


def _kept(layer, report, reason):
    report.append(FoldedLayer(layer.name, type(layer).__name__, None, reason))
    clone = copy_of(layer)
    clone.trainable = False
    return clone


def _noted(layer, report, clone):
    into = type(clone).__name__
    report.append(FoldedLayer(layer.name, type(layer).__name__, into, None))
    return clone
