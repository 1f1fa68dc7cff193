"""Finds and copies the layers of a model."""

import keras


def sublayers(layer):
    """Lists `layer` and every layer inside it, each once, `layer` first.

    Searches the attributes of each layer, and lists, tuples, sets and dicts in them.
    Models, wrappers and cells keep their layers there.
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
    """Copies a layer by its configuration; returns an operation as it is."""
    if not isinstance(layer, keras.layers.Layer):
        return layer  # an operation such as `keras.ops.add`: it has no state
    if isinstance(layer, keras.layers.Lambda):
        # Deserializing is safe: the code comes from this process, not from a file. The
        # copy uses the function itself, which can read the globals of its module.
        clone = type(layer).from_config(layer.get_config(), safe_mode=False)
        clone.function = layer.function
        return clone
    return type(layer).from_config(layer.get_config())


def clone_graph(model, clone_function, input_tensors=None, copies=None):
    """Clones a model as `keras.models.clone_model`, but does not compile the clone.

    Keras would compile the clone from configurations, and fails if a loss or metric is
    a function that is not registered with Keras. This function passes Keras a view of
    the model that is not compiled. The model itself is not changed.

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
    """Makes names unique: appends `_1`, `_2`, ... to repeated names."""
    unique = []
    for name in names:
        candidate, number = name, 0
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def has_graph(model):
    """Returns whether a model is Sequential or Functional, not subclassed."""
    return isinstance(model, keras.Sequential) or hasattr(model, "inputs")


def require_built_graph(model, purpose):
    """Raises an error unless `model` is a built Sequential or Functional model.

    Args:
        model: The argument `model` of a public function.
        purpose: The name of the function in messages, such as "`fold`".
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a `keras.Model` for {purpose}. Received: model={model!r}"
        )
    if not has_graph(model):
        raise ValueError(
            f"`model` must be Sequential or Functional for {purpose}, which reads its "
            "graph: a subclassed model has none. Build it with the functional API. "
            f"Received: model={model.name!r} of class {type(model).__name__}"
        )
    if not model.built or not model.inputs:
        raise ValueError(
            f"`model` must be built for {purpose}: start it with `keras.Input(...)`, "
            f"or call it on data once. Received: model={model.name!r}, not built"
        )
