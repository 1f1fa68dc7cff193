"""Loss and metrics of the valid frames of padded sequences."""

import keras
from keras import ops


class StringCrossEntropy(keras.losses.Loss):
    """Cross-entropy in nats, summed over valid frames and averaged over strings."""

    def __init__(self):
        super().__init__(name="string_cross_entropy", reduction="sum")

    def call(self, classes, logits):
        strings = ops.cast(ops.shape(logits)[0], logits.dtype)
        return cross_entropy(classes, logits) / strings  # (B, T)


class FrameMean(keras.metrics.Mean):
    """Averages a function of classes and logits over all valid frames.

    Keras' own metric averages over the timesteps of each string first, padding
    included. A batch with more padding would count less.
    """

    def __init__(self, function, name):
        super().__init__(name=name)
        self.function = function

    def update_state(self, classes, logits, sample_weight):
        values = self.function(classes, logits)
        super().update_state(
            ops.reshape(values, [-1]), ops.reshape(sample_weight, [-1])
        )


def cross_entropy(classes, logits):
    """Returns (B, T), in nats."""
    return keras.losses.sparse_categorical_crossentropy(
        classes, logits, from_logits=True
    )


def is_error(classes, logits):
    """Returns (B, T): 1 where another class has the highest logit."""
    best = ops.argmax(logits, axis=-1)
    return ops.cast(ops.not_equal(best, ops.cast(classes, best.dtype)), "float32")
