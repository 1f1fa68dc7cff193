"""Defines `normalize_model`, which replaces stock layers by normalised layers."""

import typing
from typing import Unpack

import keras
from keras import ops

from keras_bnrnn.calibration import population_statistics
from keras_bnrnn.checks import check_flag
from keras_bnrnn.layers import KINDS, BNCell
from keras_bnrnn.layers.arguments import DEFAULTS, NormalizationArguments
from keras_bnrnn.layers.rnn import BNRNN
from keras_bnrnn.replacement import (
    Replacer,
    compile_like,
    of_same_makes,
    warn_of_kept,
)
from keras_bnrnn.traversal import copy_of, require_built_graph, sublayers


class NormalizedLayer(typing.NamedTuple):
    """Reports how `normalize_model` treated one recurrent layer or cell.

    Attributes:
        name: The name of the layer.
        layer: The class of the layer, such as `"LSTM"`.
        normalized_into: The class of the layer that replaces it, or `None`.
        kept_because: Why the layer was kept as it is. `None` if it was replaced.
        changed: Dict of the arguments that the replacement has other values of, such
            as `{"use_bias": True}`.
    """

    name: str
    layer: str
    normalized_into: str | None
    kept_because: str | None
    changed: dict


@typing.overload
def normalize_model(
    model: keras.Model,
    data: typing.Any,
    steps: int | None = None,
    batch_size: int = 32,
    verbose: int = 1,
    return_report: typing.Literal[False] = False,
    **normalization: Unpack[NormalizationArguments],
) -> keras.Model: ...


@typing.overload
def normalize_model(
    model: keras.Model,
    data: typing.Any,
    steps: int | None = None,
    batch_size: int = 32,
    verbose: int = 1,
    *,
    return_report: typing.Literal[True],
    **normalization: Unpack[NormalizationArguments],
) -> tuple[keras.Model, list[NormalizedLayer]]: ...


@typing.overload
def normalize_model(
    model: keras.Model,
    data: typing.Any,
    steps: int | None = None,
    batch_size: int = 32,
    verbose: int = 1,
    *,
    return_report: bool,
    **normalization: Unpack[NormalizationArguments],
) -> keras.Model | tuple[keras.Model, list[NormalizedLayer]]: ...


def normalize_model(
    model: keras.Model,
    data: typing.Any,
    steps: int | None = None,
    batch_size: int = 32,
    verbose: int = 1,
    return_report: bool = False,
    **normalization: Unpack[NormalizationArguments],
) -> keras.Model | tuple[keras.Model, list[NormalizedLayer]]:
    """Returns a copy of a model with batch-normalised recurrent layers.

    This is the inverse of `fold`. `BNLSTM`, `BNGRU` and `BNSimpleRNN` replace `LSTM`,
    `GRU` and `SimpleRNN`, and their cells replace the stock cells in
    `keras.layers.RNN`. The weights are carried over. The population statistics are the
    exact mean and variance of the pre-activations over all valid frames of `data`.
    gamma and beta undo them:

    `gamma = sqrt(variance + epsilon)`, `beta = bias + mean`

    Inference then starts equal to that of `model`. In training, the layers normalise
    by the statistics of each batch. A layer computes the same function before and after
    its calibration, so the data is read once for all layers.

    Args:
        model: A built Sequential or Functional model, trained or not. It may contain
            shared layers, nested models, `Bidirectional`, `TimeDistributed`,
            `keras.layers.RNN` and `StackedRNNCells`. It is not changed.
        data: The training data, as for `recalibrate`: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or another iterable of batches.
        steps: Number of batches to use. These batches are kept in memory. Default: all
            batches. Endless data sets and iterators require `steps`.
        batch_size: Int, for arrays. Default: 32.
        verbose: 1 (default) for a progress bar, 2 for a line, 0 for silence.
        return_report: Whether to return the list of `NormalizedLayer` as well. Default:
            `False`.
        **normalization: Arguments of the new layers: `normalize`, `statistics`,
            `population`, `max_timesteps`, `momentum`, `epsilon`, `gamma_initializer`,
            `synchronized`. See `BNLSTM` for their values and defaults.

    Returns:
        The new model, or `(new model, report)` with `return_report`. Layers keep their
        names, arguments, dtype policies, `trainable` flags and states. A layer with
        `use_bias=False` gets `use_bias=True`, because beta holds the mean. Regularizers
        and constraints of the bias apply to beta. The new model is compiled like
        `model`, if the optimizer, losses and metrics are part of Keras or registered
        with Keras. Its optimizer starts without the moments of the old one.

        A recurrent layer that cannot be replaced is kept as it is, and a warning names
        it: a layer inside a user-defined layer, a subclass of a stock layer, another
        kind of layer or cell, or a layer with a dropout rate of 1. Layers that are
        batch-normalised already are kept without a warning.

        Outputs agree to 1e-5 for inputs whose mean is not large compared with their
        deviation, as those of `fold` do. With half precision they agree to the
        rounding of its dtype. They differ for masked inputs of an unrolled stock layer
        that goes backwards and has zeros as masked outputs, such as the backward layer
        of `Bidirectional(LSTM(8, return_sequences=True, unroll=True))`: Keras 3.15
        applies the mask to its outputs in the wrong order, and the new layer does not.

    Raises:
        ValueError: If `model` is subclassed, not built, or has no recurrent layer, if
            an argument of normalisation is unknown or out of range, or if `data` has no
            batch, no valid frame, fewer than `steps` batches or a valid frame that is
            not finite, or if it is endless and `steps` is `None`.

    Example:

    >>> model = keras.Sequential([keras.Input((None, 8)), keras.layers.LSTM(4)])
    >>> x = np.random.default_rng(0).normal(size=(100, 10, 8))
    >>> normalized = normalize_model(model, x, verbose=0)
    >>> [type(layer).__name__ for layer in normalized.layers]
    ['BNLSTM']
    >>> bool(np.allclose(model(x), normalized(x), atol=1e-5))
    True
    """
    if unknown := sorted(set(normalization) - set(DEFAULTS)):
        received = [f"{name}={normalization[name]!r}" for name in unknown]
        raise ValueError(
            "Arguments of `normalize_model` for the new layers must be those of "
            f"normalisation: {', '.join(DEFAULTS)}. All other arguments of a layer are "
            f"those of the layer it replaces. Received: {', '.join(received)}"
        )
    check_flag("return_report", return_report)
    require_built_graph(model, "`normalize_model`")
    if not any(isinstance(part, keras.layers.RNN) for part in sublayers(model)):
        raise ValueError(
            "`model` must have a recurrent layer to normalise: an `LSTM`, `GRU`, "
            "`SimpleRNN` or a `keras.layers.RNN` of their cells. "
            f"Received: model={model.name!r}"
        )
    normalizing = _Normalizing(normalization)
    normalized = normalizing.copy(model)
    cells = list(normalizing.weights_of_cells.values())
    if cells:
        norms = [cell.input_norm for cell, _ in cells]
        options = (data, steps, batch_size, verbose)
        moments = population_statistics(normalized, norms, *options)
        for (cell, weights), of_cell in zip(cells, moments, strict=True):
            cell.input_norm.set_statistics(*of_cell)
            cell.set_stock_weights(*weights)
    compile_like(model, normalized)
    report = normalizing.report
    warn_of_kept(
        "Not normalised, kept as they are: ",
        [e for e in report if e.kept_because not in (None, NORMALIZED_ALREADY)],
    )
    return (normalized, report) if return_report else normalized


NORMALIZED_ALREADY = "it is batch-normalised already"

# The class that replaces each stock class.
REPLACEMENTS = {cls.stock_layer: cls for cls in KINDS.values()} | {
    cls.cell_class.stock_cell: cls.cell_class for cls in KINDS.values()
}


class _Normalizing(Replacer):
    """Replaces stock layers and cells by normalised ones.

    Args:
        normalization: Dict, the arguments of normalisation.

    Attributes:
        report: List of `NormalizedLayer`.
        weights_of_cells: Dict from the `id` of each new cell to the cell and the list
            of the weights of the stock cell.
    """

    def __init__(self, normalization):
        super().__init__("normalize_model")
        self.normalization = normalization
        self.report = []
        self.weights_of_cells = {}

    def concerns(self, layer):
        # Every recurrent layer and every cell has states. These two only contain cells.
        containers = (keras.layers.RNN, keras.layers.StackedRNNCells)
        return hasattr(layer, "state_size") and type(layer) not in containers

    def replaced(self, layer):
        if reason := _why_not(layer):
            return self.kept(layer, reason)
        cls = REPLACEMENTS[type(layer)]
        config = layer.get_config()
        if hasattr(layer, "use_cudnn"):
            config["use_cudnn"] = layer.use_cudnn  # Keras leaves it out of the config
        changed = {} if layer.use_bias else {"use_bias": True}
        self._note(layer, cls.__name__, None, changed)
        return cls.from_config({**config, **changed, **self.normalization})

    def kept(self, layer, reason):
        self._note(layer, None, reason)
        return copy_of(layer)

    def _note(self, layer, into, reason, changed=()):
        kind = type(layer).__name__
        entry = NormalizedLayer(layer.name, kind, into, reason, dict(changed))
        self.report.append(entry)

    def copy_weights(self, layer, clone):
        # Outer layers first: setting the flag of a layer sets those inside it, too.
        pairs = [(layer, clone)]
        if not isinstance(layer, keras.Model) and of_same_makes(layer, clone):
            pairs = zip(sublayers(layer), sublayers(clone), strict=True)
        for part, copied in pairs:
            copied.trainable = part.trainable
        super().copy_weights(layer, clone)

    def copy_replaced_weights(self, layer, clone):
        weights = [layer.kernel, layer.recurrent_kernel]
        if layer.use_bias:
            weights.append(layer.bias)
        weights = [ops.convert_to_numpy(w).astype("float64") for w in weights]
        clone.set_stock_weights(*weights)
        self.weights_of_cells[id(clone)] = clone, weights


def _why_not(layer):
    """Returns why a recurrent layer or cell is not replaced, or `None` if it is."""
    if isinstance(layer, (BNRNN, BNCell)):
        return NORMALIZED_ALREADY
    if type(layer) not in REPLACEMENTS:
        return (
            "only LSTM, GRU, SimpleRNN and their cells are replaced, not their "
            "subclasses or other classes"
        )
    for name in ("dropout", "recurrent_dropout"):
        if getattr(layer, name) >= 1.0:
            return f"batch-normalised layers have no {name}={getattr(layer, name)}"
    return None
