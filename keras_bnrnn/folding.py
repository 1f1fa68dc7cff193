"""Defines `fold`, which replaces normalised layers by stock Keras layers."""

import inspect
import typing

import keras
from keras import ops

from keras_bnrnn.checks import check_flag
from keras_bnrnn.layers.cell import BNCell, changed_methods
from keras_bnrnn.layers.rnn import BNRNN
from keras_bnrnn.replacement import Replacer, compile_like, warn_of_kept
from keras_bnrnn.sequence_batch_norm import (
    SequenceBatchNorm,
    warn_of_nonfinite_batches,
)
from keras_bnrnn.traversal import copy_of, require_built_graph, sublayers


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
    check_flag("return_report", return_report)
    folding = _Folding("fold")
    require_built_graph(model, "`fold`")
    warn_of_nonfinite_batches(
        part for part in sublayers(model) if isinstance(part, SequenceBatchNorm)
    )
    folded = folding.copy(model)
    compile_like(model, folded)
    report = folding.report
    warn_of_kept(
        "Not folded, kept frozen: ",
        [entry for entry in report if entry.kept_because is not None],
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


class _Folding(Replacer):
    """Replaces normalised layers by stock layers.

    Attributes:
        report: List of `FoldedLayer`.
    """

    def __init__(self, name):
        super().__init__(name)
        self.report = []

    def concerns(self, layer):
        return isinstance(layer, (BNRNN, BNCell, SequenceBatchNorm))

    def replaced(self, layer):
        if reason := _why_not(layer):
            return self.kept(layer, reason)
        is_norm = isinstance(layer, SequenceBatchNorm)
        clone = _stock_norm(layer) if is_norm else _stock(layer)
        into = type(clone).__name__
        self.report.append(FoldedLayer(layer.name, type(layer).__name__, into, None))
        return clone

    def kept(self, layer, reason):
        self.report.append(FoldedLayer(layer.name, type(layer).__name__, None, reason))
        clone = copy_of(layer)
        clone.trainable = False
        return clone

    def copy_replaced_weights(self, layer, clone):
        if isinstance(layer, SequenceBatchNorm):
            affine = [w for w in (layer.gamma, layer.beta) if w is not None]
            weights = [*affine, layer.moving_mean, layer.moving_variance]
        else:
            weights = layer.stock_weights(layer.folded_weights())
        clone.set_weights([ops.convert_to_numpy(w) for w in weights])


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
