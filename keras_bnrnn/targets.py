"""Finds the normalised sites of a model, and listens to the calls of their layers."""

import contextlib
import inspect

import keras
import numpy as np
from keras import ops

from keras_bnrnn.frames import Frames
from keras_bnrnn.layers.cell import BNCell
from keras_bnrnn.layers.rnn import BNRNN
from keras_bnrnn.sequence_batch_norm import SequenceBatchNorm
from keras_bnrnn.traversal import sublayers


class Target:
    """A `SequenceBatchNorm` and the layer whose calls determine its inputs.

    Args:
        name: The name of the target in reports and messages.
        norm: The `SequenceBatchNorm`.
        layer: The layer whose calls are recorded.
        pre_activations: Function `(inputs, initial_state, mask)` that returns the
            inputs of `norm`, a float64 tensor of shape (T, B, ..., F), in which t
            counts the valid frames of each row, and a boolean tensor that broadcasts to
            it, true at valid frames. It is `None` without a mask.
        frame_wise: Whether a training step takes its statistics at each t alone.
        recursive: Whether the pre-activations depend on the statistics of `norm`.
            Default: `False`.
        cell: The `BNCell` that `norm` belongs to. Default: `None`.
        gate_values: Function `(inputs, initial_state, mask)` that returns what
            `BNRNN.gate_values` returns for `cell`. Default: `None`, without a cell.
    """

    def __init__(
        self,
        name,
        norm,
        layer,
        pre_activations,
        frame_wise,
        recursive=False,
        cell=None,
        gate_values=None,
    ):
        self.name = name
        self.norm = norm
        self.layer = layer
        self.pre_activations = pre_activations
        self.frame_wise = frame_wise
        self.recursive = recursive
        self.cell = cell
        self.gate_values = gate_values
        self.calls = []  # ids of the inputs of its calls in one pass

    def statistics(self):
        variables = (
            self.norm.moving_mean,
            self.norm.moving_variance,
            self.norm.update_count,
        )
        return [ops.convert_to_numpy(v).copy() for v in variables]


def find_targets(model):
    """Lists the `Target` of each normalised site of a model.

    Raises:
        ValueError: If a normalised cell is not in a `keras.layers.RNN`.
    """
    targets, claimed = [], set()

    def add(name, norm, *args, **kwargs):
        targets.append(Target(name, norm, *args, **kwargs))
        claimed.add(id(norm))

    layers = sublayers(model)
    for layer in layers:
        if not isinstance(layer, keras.layers.RNN):
            continue
        stacked = isinstance(layer.cell, keras.layers.StackedRNNCells)
        cells = layer.cell.cells if stacked else [layer.cell]
        for index, cell in enumerate(cells):
            if not isinstance(cell, BNCell):
                continue
            cell_name = f"{layer.name}/{cell.name}" if stacked else layer.name
            for site, norm in cell.norms.items():
                # `keras.layers.RNN` calls its cell at each timestep alone.
                by_step = not isinstance(layer, BNRNN) or site != "input"
                add(
                    cell_name if len(cell.norms) == 1 else f"{cell_name}/{site}",
                    norm,
                    layer,
                    _reader_of_cell(layer, cells, index, "pre_activations", site),
                    frame_wise=by_step or norm.statistics == "frame",
                    recursive=site != "input",
                    cell=cell,
                    gate_values=_reader_of_cell(layer, cells, index, "gate_values"),
                )
    for layer in layers:
        if isinstance(layer, BNCell) and not claimed.issuperset(
            map(id, layer.norms.values())
        ):
            raise ValueError(
                "A normalised cell can be recalibrated or monitored in "
                "`keras.layers.RNN` or `StackedRNNCells` only: elsewhere its timesteps "
                f"are not known. Received: cell {layer.name!r} in model={model.name!r}"
            )
        if isinstance(layer, SequenceBatchNorm) and id(layer) not in claimed:
            frame_wise = layer.statistics == "frame"
            add(layer.name, layer, layer, _inputs_of_norm, frame_wise)
    return targets


def _inputs_of_norm(inputs, initial_state, mask):
    """The `pre_activations` of a `Target` whose layer is a `SequenceBatchNorm`."""
    x = ops.cast(inputs, "float64")
    if mask is None:
        return Frames(None).arrange(x), None
    mask = ops.cast(mask, "bool")
    shape = ops.shape(mask) + (1,) * (len(x.shape) - len(mask.shape))
    valid = ops.reshape(mask, shape)
    frames = Frames(ops.any(valid, axis=tuple(range(2, len(x.shape)))))
    return frames.arrange(x), frames.arrange(ops.cast(valid, x.dtype)) > 0


def _reader_of_cell(layer, cells, index, method, *arguments):
    """Returns a function of a call of `layer` that reads `cells[index]`.

    Args:
        layer: A `keras.layers.RNN`.
        cells: The list of its cells, from the bottom up.
        index: Int, the position of the cell.
        method: The name of the method of `BNRNN` that computes the result.
        *arguments: The first arguments of the method.
    """

    def read(inputs, initial_state, mask):
        if layer.go_backwards:
            inputs = ops.flip(inputs, axis=1)
            mask = None if mask is None else ops.flip(mask, axis=1)
        if initial_state is None:
            initial_state = layer.states if layer.stateful else None
        states = [None] * len(cells)
        if initial_state is not None:
            states = list(initial_state) if len(cells) > 1 else [initial_state]
        for cell, state in zip(cells[:index], states, strict=False):
            single = BNRNN if isinstance(cell, BNCell) else keras.layers.RNN
            below = single(cell, return_sequences=True, dtype=cell.dtype_policy)
            inputs = below(inputs, initial_state=state, mask=mask, training=False)
        own = BNRNN(cells[index], dtype=cells[index].dtype_policy)
        return getattr(own, method)(*arguments, inputs, states[index], mask)

    return read


@contextlib.contextmanager
def listening(targets, heard):
    """Calls `heard(target, inputs, initial_state, mask)` when its layer is called."""
    layers = {id(target.layer): target.layer for target in targets}
    own_calls = {key: vars(layer).get("call") for key, layer in layers.items()}

    def listener(layer):
        call = layer.call
        signature = inspect.signature(call)

        def listen(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            inputs = next(iter(bound.values()))
            mask = bound.get("mask")
            if mask is not None:
                mask = keras.tree.flatten(mask)[0]
            for target in targets:
                if target.layer is layer:
                    heard(target, inputs, bound.get("initial_state"), mask)
            return call(*args, **kwargs)

        return listen

    try:
        for layer in layers.values():
            layer.call = listener(layer)
        yield
    finally:
        for key, layer in layers.items():
            if own_calls[key] is None:
                vars(layer).pop("call", None)
            else:
                layer.call = own_calls[key]


@contextlib.contextmanager
def unchanged_states(model):
    """Restores the states of stateful layers."""
    variables = state_variables(model)
    values = [ops.convert_to_numpy(v).copy() for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def state_variables(model):
    """Lists the states of the stateful layers of a model."""
    return [
        state
        for layer in sublayers(model)
        if isinstance(layer, keras.layers.RNN) and layer.stateful
        for state in keras.tree.flatten(layer.states)
        if state is not None
    ]


def is_array(value):
    """Returns whether a value is an array of NumPy or a tensor of the backend."""
    return isinstance(value, np.ndarray) or keras.ops.is_tensor(value)


def inputs_of(model, batch):
    """Returns the inputs x of a batch, as tensors.

    Args:
        model: The model that receives x.
        batch: `x`, or a tuple `(x, y, ...)`. If the model has several inputs, a list of
            as many arrays is x.
    """
    inputs = getattr(model, "inputs", None) or [None]
    several = isinstance(batch, list) and len(inputs) == len(batch) > 1
    if several and all(map(is_array, batch)):
        x = batch
    else:
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    return keras.tree.map_structure(ops.convert_to_tensor, x)
