"""Walks the layers that a model is made of."""

import keras


def sublayers(layer):
    """Every layer inside `layer`, itself first, each once, in order of creation.

    Looks through models, wrappers, cells and whatever else keeps layers in its
    attributes or in lists, tuples and dicts there.
    """
    found, queue = {}, [layer]
    while queue:
        current = queue.pop(0)
        if id(current) in found:
            continue
        found[id(current)] = current
        for value in vars(current).values():
            queue.extend(_layers_in(value))
    return list(found.values())


def _layers_in(value):
    if isinstance(value, keras.layers.Layer):
        yield value
    elif isinstance(value, dict):
        yield from _layers_in(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _layers_in(item)


def copy_of(layer):
    """A new layer of the same configuration; operations are returned as they are."""
    if not isinstance(layer, keras.layers.Layer):
        return layer  # an operation such as `keras.ops.add`: it has no state
    if isinstance(layer, keras.layers.Lambda):
        # Its code comes from this process, not from a file of unknown origin; and the
        # function itself, for what it finds in its module.
        clone = type(layer).from_config(layer.get_config(), safe_mode=False)
        clone.function = layer.function
        return clone
    return type(layer).from_config(layer.get_config())


def clone_graph(model, clone_function, input_tensors=None, copies=None):
    """`keras.models.clone_model`, whatever the model is compiled with.

    Keras would compile the copy by configurations, and fails where a loss or metric is
    a function that is not registered with it. It is given a view of the model that is
    not compiled; the model itself is not touched.

    Args:
        model: A Sequential or Functional model.
        clone_function: Function of a layer to its copy. Models inside `model` are
            cloned by their layers.
        input_tensors: As for `keras.models.clone_model`.
        copies: Dict from `id(layer)` to the copies made so far, for shared layers.

    Returns:
        A new model, not compiled.
    """
    copies = {} if copies is None else copies

    def copy(layer):
        if id(layer) not in copies:
            if isinstance(layer, keras.Model) and has_graph(layer):
                clone = clone_graph(layer, clone_function, copies=copies)
            else:
                clone = clone_function(layer)
            copies[id(layer)] = clone
        return copies[id(layer)]

    view = object.__new__(type(model))
    vars(view).update(vars(model), compiled=False)
    return keras.models.clone_model(
        view, input_tensors=input_tensors, clone_function=copy
    )


def numbered(names):
    """The names, with `_1`, `_2`, ... after those that came before."""
    unique = []
    for name in names:
        candidate, number = name, 0
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def has_graph(model):
    """Whether a model is Sequential or Functional, not subclassed."""
    return isinstance(model, keras.Sequential) or hasattr(model, "inputs")


def require_built_graph(model, purpose):
    """Refuses what is not a built Sequential or Functional model.

    Args:
        model: What a user passed as `model`.
        purpose: What it is needed for, as in "`fold`".
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a `keras.Model` for {purpose}. Received: model={model!r}"
        )
    if not has_graph(model):
        raise ValueError(
            f"{purpose} reads the graph of a Sequential or Functional model, and "
            "a subclassed one has none: build it with the functional API. "
            f"Received: model={model.name!r} of class {type(model).__name__}"
        )
    if not model.built or not model.inputs:
        raise ValueError(
            f"`model` must be built for {purpose}: start it with `keras.Input(...)`, "
            f"or call it on data once. Received: model={model.name!r}, not built"
        )
