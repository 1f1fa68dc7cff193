"""Defines `from_torch`, which fills Keras layers with the weights of PyTorch."""

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import keras
import numpy as np
from keras.activations import relu, sigmoid, tanh

from keras_bnrnn.layers import BNCell

Layers = TypeVar("Layers")  # a layer, a list of layers, or a model


def from_torch(
    state_dict: Mapping[str, Any], layers: Layers, prefix: str = ""
) -> Layers:
    """Fills stock recurrent layers with the weights of a `torch.nn` recurrent module.

    The module is a `torch.nn.LSTM`, `GRU` or `RNN` with any `num_layers`,
    `bidirectional` and `bias`. PyTorch is not imported. The caller makes the layers,
    because a state dict does not contain the nonlinearity of an RNN, dropout rates, or
    the layers before and after the module. To get batch-normalised layers, pass the
    filled model to `normalize_model`.

    Args:
        state_dict: Dict from names to arrays or tensors, such as `lstm.state_dict()`,
            or that of a model that contains the module, with `prefix`.
        layers: A layer, a list of layers, or a model. Its recurrent layers are filled
            in their order. Other layers do not change. Each layer of the module needs
            one recurrent layer: an `LSTM`, `GRU` or `SimpleRNN`, inside `Bidirectional`
            if the module is bidirectional. `keras.layers.RNN` of stock cells counts as
            one layer for each cell. Layers that are not built are built.
        prefix: The start of the names of the module in `state_dict`, such as
            `"encoder.lstm."`. Names that start otherwise are ignored. Default: `""`.

    Returns:
        `layers`.

    Raises:
        ValueError: If names are missing or unknown, if the module has `proj_size`, or
            if the layers differ from the module in number, kind, sizes, directions,
            activations, bias or `reset_after`. No weight changes then.

    Keras layers are batch-first, as modules with `batch_first=True`. The gates i, f, g,
    o of PyTorch are i, f, c, o of Keras, and r, z, n are z, r, h in another order.
    PyTorch has two biases. `LSTM` and `SimpleRNN` of Keras have their sum. `GRU` has
    both, with `reset_after=True` (its default). If the module has no bias, layers with
    `use_bias=True` get zeros.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> state_dict = {  # of `torch.nn.LSTM(3, 2)`
    ...     "weight_ih_l0": rng.normal(size=(8, 3)),
    ...     "weight_hh_l0": rng.normal(size=(8, 2)),
    ...     "bias_ih_l0": rng.normal(size=8),
    ...     "bias_hh_l0": rng.normal(size=8),
    ... }
    >>> model = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(2)])
    >>> model = from_torch(state_dict, model)
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            "`state_dict` must be a dict from names to arrays. "
            f"Received: state_dict={state_dict!r}"
        )
    if not isinstance(prefix, str):
        raise ValueError(f"`prefix` must be a string. Received: prefix={prefix!r}")
    parts = _read(state_dict, prefix)
    slots = _find_slots(layers)
    depth = len({index for index, _ in parts})
    if len(slots) != depth:
        names = [slot.layer.name for slot in slots]
        raise ValueError(
            "`layers` must have one recurrent layer or cell for each layer of the "
            f"module in `state_dict`. Received: layers={names} for {depth} layers of "
            "the module"
        )
    weights = []  # pairs of a cell and its new weights
    for index, slot in enumerate(slots):
        reverse = (index, True) in parts
        if len(slot.cells) != 1 + reverse:
            where = "in `keras.layers.Bidirectional`" if reverse else "of one direction"
            raise ValueError(
                f"`layers` must be {where}, as the module in `state_dict` is. "
                f"Received: layer {slot.layer.name!r}"
            )
        for number, cell in enumerate(slot.cells):
            part = parts[index, bool(number)]
            _check_cell(cell, part, slot.layer)
            weights.append((cell, _keras_weights(cell, part)))
    for index, slot in enumerate(slots):
        if not slot.layer.built:
            slot.layer.build((None, None, parts[index, False]["weight_ih"].shape[1]))
    for cell, values in weights:
        cell.set_weights(values)
    return layers


class _Kind(typing.NamedTuple):
    """What the weights of a kind of cell are in PyTorch.

    Attributes:
        module: The name of the module in `torch.nn`.
        gates: List of ints: the gates of PyTorch in the order of Keras.
        activations: The activations that the module can have.
    """

    module: str
    gates: list
    activations: tuple


KINDS = {
    keras.layers.LSTMCell: _Kind("LSTM", [0, 1, 2, 3], (tanh,)),
    keras.layers.GRUCell: _Kind("GRU", [1, 0, 2], (tanh,)),
    keras.layers.SimpleRNNCell: _Kind("RNN", [0], (tanh, relu)),
}
NAME = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)_l(\d+)(_reverse)?")


def _read(state_dict, prefix):
    """Reads a state dict.

    Returns:
        Dict from `(layer, reverse)`, an int and a bool, to the weights of one
        direction: a dict from `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh` to arrays.
    """
    parts = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(
                f"`state_dict` must have strings as keys. Received: {name!r}"
            )
        if not name.startswith(prefix):
            continue
        short = name.removeprefix(prefix)
        if short.startswith("weight_hr_l"):
            raise ValueError(
                "`state_dict` must be of a module without `proj_size`: Keras has no "
                f"layer with a projection of the output. Received: {name!r}"
            )
        match = NAME.fullmatch(short)
        if match is None:
            raise ValueError(
                "`state_dict` must have the names of a torch.nn.LSTM, GRU or RNN after "
                f"`prefix`. {_hint(state_dict)}. Received: {name!r} with "
                f"prefix={prefix!r}"
            )
        role, index, reverse = match.groups()
        part = parts.setdefault((int(index), reverse is not None), {})
        part[role] = _array(name, value)
    if not parts:
        raise ValueError(
            "`state_dict` must have names that start with `prefix`. "
            f"{_hint(state_dict)}. Received: prefix={prefix!r}"
        )
    _require_complete(parts, prefix)
    return parts


def _hint(state_dict):
    prefixes = [
        name.removesuffix("weight_ih_l0")
        for name in state_dict
        if name.endswith("weight_ih_l0")
    ]
    if not prefixes:
        return "It has no name that ends with weight_ih_l0"
    return "Pass prefix=" + " or prefix=".join(map(repr, prefixes))


def _require_complete(parts, prefix):
    """Raises an error if a weight is missing."""
    depth = 1 + max(index for index, _ in parts)
    directions = (False, True) if any(reverse for _, reverse in parts) else (False,)
    roles = ["weight_ih", "weight_hh"]
    if any("bias_ih" in part or "bias_hh" in part for part in parts.values()):
        roles += ["bias_ih", "bias_hh"]
    for index in range(depth):
        for reverse in directions:
            for role in roles:
                if role not in parts.get((index, reverse), {}):
                    name = f"{prefix}{role}_l{index}{'_reverse' if reverse else ''}"
                    raise ValueError(
                        "`state_dict` must have the weights of every layer and "
                        f"direction. Received: no {name!r}"
                    )
    for part in parts.values():
        _require_shapes(part, prefix)


def _require_shapes(part, prefix):
    """Raises an error if the weights of one direction do not fit together."""
    shapes = {role: array.shape for role, array in part.items()}
    recurrent, inputs = shapes["weight_hh"], shapes["weight_ih"]
    fits = (
        len(recurrent) == 2
        and recurrent[1] > 0
        and recurrent[0] % recurrent[1] == 0
        and len(inputs) == 2
        and inputs[0] == recurrent[0]
    )
    for role in ("bias_ih", "bias_hh"):
        fits = fits and shapes.get(role, recurrent[:1]) == recurrent[:1]
    if not fits:
        raise ValueError(
            "`state_dict` must have the shapes of torch.nn.LSTM, GRU or RNN: with G "
            "gates, U units and D features weight_hh (G*U, U), weight_ih (G*U, D) and "
            f"biases (G*U,). Received: {shapes} with prefix={prefix!r}"
        )


def _array(name, value):
    """Returns a float64 array of an array or a tensor, on any device."""
    given = value
    for method in ("detach", "cpu", "double"):  # NumPy has no bfloat16
        value = getattr(value, method, lambda value=value: value)()
    if not hasattr(value, "__array__") and hasattr(value, "numpy"):
        value = value.numpy()
    try:
        return np.asarray(value, "float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`state_dict` must have arrays or tensors of numbers. "
            f"Received: {name!r} with {given!r}"
        ) from error


class _Slot(typing.NamedTuple):
    """The place of one layer of the module.

    Attributes:
        layer: The Keras layer.
        cells: Its cells: one, or the forward and the backward cell.
    """

    layer: keras.layers.Layer
    cells: list


def _find_slots(layers):
    """Lists the places of the layers of the module, each once, in their order."""
    slots, seen = [], set()

    def visit(layer):
        if isinstance(layer, (list, tuple)):
            for part in layer:
                visit(part)
        elif isinstance(layer, keras.Model):
            visit(layer.layers)
        elif isinstance(layer, keras.layers.TimeDistributed):
            visit(layer.layer)
        elif not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "`layers` must be a layer, a list of layers or a model. "
                f"Received: layers={layers!r}"
            )
        elif id(layer) not in seen:
            seen.add(id(layer))
            slots.extend(_slots_of(layer))

    visit(layers)
    return slots


def _slots_of(layer):
    if isinstance(layer, keras.layers.Bidirectional):
        directions = [layer.forward_layer, layer.backward_layer]
        directions.sort(key=lambda direction: direction.go_backwards)
        return [_Slot(layer, [direction.cell for direction in directions])]
    if not isinstance(layer, keras.layers.RNN):
        return []
    if layer.go_backwards:
        raise ValueError(
            "`layers` must read sequences forwards, except in "
            "`keras.layers.Bidirectional`. Received: go_backwards=True in layer "
            f"{layer.name!r}"
        )
    stacked = isinstance(layer.cell, keras.layers.StackedRNNCells)
    cells = layer.cell.cells if stacked else [layer.cell]
    return [_Slot(layer, [cell]) for cell in cells]


def _check_cell(cell, part, layer):
    """Raises an error if a cell cannot compute what the module does."""
    received = f"Received: {type(cell).__name__} in layer {layer.name!r}"
    if isinstance(cell, BNCell):
        raise ValueError(
            "`layers` must be stock layers: fill these, and pass the model to "
            f"`normalize_model`, which computes the statistics. {received}"
        )
    if type(cell) not in KINDS:
        raise ValueError(f"`layers` must be LSTM, GRU or SimpleRNN. {received}")
    kind = KINDS[type(cell)]
    rows, units = part["weight_hh"].shape
    modules = {len(k.gates) * units: k.module for k in KINDS.values()}
    module = modules.get(rows, "unknown module")
    if module != kind.module:
        raise ValueError(
            f"`layers` must be of the kind of the module: {type(cell).__name__} takes "
            f"the weights of torch.nn.{kind.module}. {received} for a torch.nn.{module}"
        )
    features = part["weight_ih"].shape[1]
    known = cell.kernel.shape[0] if cell.built else features
    if (cell.units, known) != (units, features):
        raise ValueError(
            f"`layers` must have the sizes of the module: {units} units of {features} "
            f"input features. {received}, of {cell.units} units and {known} features"
        )
    if "bias_ih" in part and not cell.use_bias:
        raise ValueError(
            "`layers` must have `use_bias=True`: the module has a bias. "
            f"{received} with use_bias=False"
        )
    if not getattr(cell, "reset_after", True):
        raise ValueError(
            "`layers` must have `reset_after=True`, which is how torch.nn.GRU "
            f"computes. {received} with reset_after=False"
        )
    name = getattr(cell.activation, "__name__", cell.activation)
    usual = getattr(cell, "recurrent_activation", sigmoid) is sigmoid
    if not usual or cell.activation not in kind.activations:
        raise ValueError(
            f"`layers` must have the activations of torch.nn.{kind.module}: "
            f"{' or '.join(a.__name__ for a in kind.activations)}, and sigmoid for "
            f"gates. {received} with activation={name}"
        )


def _keras_weights(cell, part):
    """Returns the weights of one direction as a cell of Keras has them."""
    kind = KINDS[type(cell)]

    def in_order(array):
        gates = np.split(array, len(kind.gates))
        return np.concatenate([gates[gate] for gate in kind.gates])

    weights = [in_order(part[role]).T for role in ("weight_ih", "weight_hh")]
    if cell.use_bias:
        zeros = np.zeros(len(part["weight_hh"]))
        biases = [in_order(part.get(role, zeros)) for role in ("bias_ih", "bias_hh")]
        both = np.stack(biases)  # (2, G*U)
        weights.append(both if kind.module == "GRU" else both.sum(axis=0))
    return weights
