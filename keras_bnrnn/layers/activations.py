"""Lists the properties of Keras' activation functions."""

import keras

BOUNDED = (
    keras.activations.hard_sigmoid,
    keras.activations.hard_tanh,
    keras.activations.sigmoid,
    keras.activations.softmax,
    keras.activations.softsign,
    keras.activations.sparse_sigmoid,
    keras.activations.tanh,
)

ELEMENTWISE = (
    keras.activations.celu,
    keras.activations.elu,
    keras.activations.exponential,
    keras.activations.gelu,
    keras.activations.hard_shrink,
    keras.activations.hard_sigmoid,
    keras.activations.hard_silu,
    keras.activations.hard_tanh,
    keras.activations.leaky_relu,
    keras.activations.linear,
    keras.activations.log_sigmoid,
    keras.activations.mish,
    keras.activations.relu,
    keras.activations.relu6,
    keras.activations.selu,
    keras.activations.sigmoid,
    keras.activations.silu,
    keras.activations.soft_shrink,
    keras.activations.softplus,
    keras.activations.softsign,
    keras.activations.sparse_plus,
    keras.activations.sparse_sigmoid,
    keras.activations.squareplus,
    keras.activations.tanh,
    keras.activations.tanh_shrink,
)


def elementwise(*activations):
    """Returns whether all are known to act on each element alone, unlike softmax."""
    return all(any(a is known for known in ELEMENTWISE) for a in activations)


def bounded(*activations):
    """Returns whether all are known to have values in [-1, 1]."""
    return all(any(a is known for known in BOUNDED) for a in activations)
