"""Lists the properties of Keras' activation functions."""

import keras

# With values in (0, 1) or (-1, 1), of each element alone.
SIGMOIDS = (
    keras.activations.hard_sigmoid,
    keras.activations.sigmoid,
    keras.activations.sparse_sigmoid,
)
TANHS = (
    keras.activations.hard_tanh,
    keras.activations.softsign,
    keras.activations.tanh,
)

BOUNDED = (*SIGMOIDS, *TANHS, keras.activations.softmax)

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


def bounds(activation):
    """Returns the bounds that an activation saturates at, or `None` if not known."""
    for known, ends in ((SIGMOIDS, (0.0, 1.0)), (TANHS, (-1.0, 1.0))):
        if any(activation is a for a in known):
            return ends
    return None
