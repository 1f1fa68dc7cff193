"""Copies a model and replaces recurrent or normalised layers inside it."""

import contextlib
import warnings

import keras

from keras_bnrnn.traversal import (
    clone_graph,
    copy_of,
    has_graph,
    require_built_graph,
    sublayers,
)


class Replacer:
    """Copies models with other layers in place of some layers.

    It finds layers inside nested models, `Bidirectional`, `TimeDistributed`,
    `keras.layers.RNN` and `StackedRNNCells`. A subclass implements `concerns`,
    `replaced`, `kept` and `copy_replaced_weights`.

    Args:
        name: The name of the public function in messages.
    """

    def __init__(self, name):
        self.name = name

    def concerns(self, layer):
        """Returns whether a layer or cell is of a kind that may be replaced."""
        raise NotImplementedError

    def replaced(self, layer):
        """Returns a layer that replaces `layer`, or a copy of `layer`, not built.

        Args:
            layer: A layer or cell that `concerns` is true of.
        """
        raise NotImplementedError

    def kept(self, layer, reason):
        """Returns a copy of a layer that cannot be replaced, not built.

        Args:
            layer: A layer that contains layers to replace, or is one.
            reason: Why the layer is kept.
        """
        raise NotImplementedError

    def copy_replaced_weights(self, layer, clone):
        """Copies weights from a replaced layer or cell to its replacement.

        Args:
            layer: A layer or cell that `concerns` is true of. For a layer of a cell,
                this is the cell.
            clone: The layer in place of `layer`, built.
        """
        raise NotImplementedError

    def copy(self, model):
        """Returns a copy of `model` with other layers in it.

        Args:
            model: A built Sequential or Functional model. It is not changed.

        Raises:
            ValueError: If `model` is subclassed or not built.
        """
        require_built_graph(model, f"`{self.name}`")
        clone = self._graph(model)
        if not clone.built:
            clone.build([x.shape for x in model.inputs])
        self.copy_weights(model, clone)
        return clone

    def _graph(self, model):
        inputs = None
        if not isinstance(model, keras.Sequential):
            layers = {id(x.output): x for x in model.layers if _is_input(x)}
            inputs = keras.tree.map_structure(
                lambda x: _copy_of_input(layers[id(x)]), model.input
            )
        return clone_graph(
            model, input_tensors=inputs, clone_function=self._copy_of_layer
        )

    def _copy_of_layer(self, layer):
        """Returns the layer in place of `layer`, not built yet."""
        if isinstance(layer, keras.Model) and has_graph(layer):
            return self._graph(layer)
        if not self._holds_replaceable(layer):
            return copy_of(layer)
        if self.concerns(layer):
            return self.replaced(layer)

        def serialized(part):
            return keras.saving.serialize_keras_object(self._copy_of_layer(part))

        config = layer.get_config()
        if type(layer) is keras.layers.Bidirectional:
            config["layer"] = serialized(layer.forward_layer)
            config["backward_layer"] = serialized(layer.backward_layer)
        elif type(layer) is keras.layers.TimeDistributed:
            config["layer"] = serialized(layer.layer)
        elif type(layer) is keras.layers.StackedRNNCells:
            config["cells"] = [serialized(cell) for cell in layer.cells]
        elif type(layer) is keras.layers.RNN:
            config["cell"] = serialized(layer.cell)
        else:
            kind = type(layer).__name__
            reason = f"{self.name} cannot see how {kind} calls what it holds"
            return self.kept(layer, reason)
        return type(layer).from_config(config)

    def _holds_replaceable(self, layer):
        return isinstance(layer, keras.layers.Layer) and any(
            self.concerns(part) for part in sublayers(layer)
        )

    def copy_weights(self, layer, clone):
        """Copies weights and states from `layer` to the built `clone`."""
        if isinstance(layer, keras.Model) and has_graph(layer):
            clones = {part.name: part for part in clone.layers}
            for part in layer.layers:
                if not _is_input(part):
                    self.copy_weights(part, clones[part.name])
        elif not self._holds_replaceable(layer) or of_same_makes(layer, clone):
            clone.set_weights(layer.get_weights())
            for part, copied in zip(sublayers(layer), sublayers(clone), strict=False):
                _copy_states(part, copied)
        elif isinstance(layer, keras.layers.Bidirectional):
            self.copy_weights(layer.forward_layer, clone.forward_layer)
            self.copy_weights(layer.backward_layer, clone.backward_layer)
        elif isinstance(layer, keras.layers.TimeDistributed):
            self.copy_weights(layer.layer, clone.layer)
        elif isinstance(layer, keras.layers.StackedRNNCells):
            for cell, copied_cell in zip(layer.cells, clone.cells, strict=True):
                self.copy_weights(cell, copied_cell)
        elif isinstance(layer, keras.layers.RNN):
            self.copy_weights(layer.cell, clone.cell)
            _copy_states(layer, clone)
        else:
            self.copy_replaced_weights(layer, clone)


def of_same_makes(layer, clone):
    """Returns whether two layers and the layers inside them have the same classes."""
    makes = [[type(part) for part in sublayers(x)] for x in (layer, clone)]
    return makes[0] == makes[1]


def compile_like(model, clone):
    """Compiles `clone` like `model`, if Keras can copy the arguments of `compile`.

    A loss or metric that is not registered with Keras cannot be deserialized. The clone
    is then not compiled.
    """
    if model.compiled and type(model).compile is keras.Model.compile:
        with contextlib.suppress(TypeError, ValueError):
            config = keras.saving.deserialize_keras_object(model.get_compile_config())
            # Not `compile_from_config`, which creates the variables of the optimizer:
            # inference does not need them, and training creates them when it starts.
            clone.compile(**config)


def warn_of_kept(prefix, entries):
    """Warns of the layers that were kept.

    Args:
        prefix: Start of the message.
        entries: Entries of a report with the fields `name`, `layer`, `kept_because`.
    """
    if entries:
        warnings.warn(
            prefix
            + "; ".join(f"{e.name} ({e.layer}): {e.kept_because}" for e in entries),
            stacklevel=3,
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


def _copy_states(layer, clone):
    """Copies the states of a stateful layer."""
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
        states, copied = (keras.tree.flatten(x.states) for x in (layer, clone))
        for state, copied_state in zip(states, copied, strict=True):
            copied_state.assign(state)
