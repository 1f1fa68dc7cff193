"""Reads and restores the nesting of a model's inputs and outputs."""

import keras


def structure_of(model, end):
    """Returns the input or output tensors of a model, nested as its user nested them.

    Args:
        model: A Sequential or Functional model.
        end: `"input"` or `"output"`.
    """
    if isinstance(model, keras.Sequential):
        tensors = getattr(model, f"{end}s")
        return tensors[0] if len(tensors) == 1 else tensors
    return getattr(model, end)


def nested_inputs(model, flat):
    """Packs a list of flat inputs into the structure that a model takes."""
    return keras.tree.pack_sequence_as(structure_of(model, "input"), flat)
