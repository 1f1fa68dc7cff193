"""The small, medium and large language models of Zaremba et al., normalised or not.

Zaremba, Sutskever and Vinyals, "Recurrent Neural Network Regularization" (arXiv
1409.2329), section 4.1.
"""

import dataclasses

import keras
from keras import ops

import keras_bnrnn


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its training.

    Attributes:
        units: Units of each of the two layers.
        timesteps: Words in a row of a batch.
        epochs: Number of epochs.
        initial: Bound of the uniform distribution of all initial kernels.
        constant_epochs: Epochs at the first learning rate.
        decay: Factor of the learning rate for each epoch after those.
        dropout: Dropout rate between layers.
        learning_rate: The first learning rate.
        clip_norm: Bound of the gradient's global norm, for a loss that is summed over
            timesteps and averaged over rows.
    """

    units: int
    timesteps: int
    epochs: int
    initial: float
    constant_epochs: int
    decay: float
    dropout: float = 0.0
    learning_rate: float = 1.0
    clip_norm: float = 5.0


SIZES = {
    "small": Size(200, 20, 13, 0.1, 4, 1 / 2),
    "medium": Size(650, 35, 39, 0.05, 6, 1 / 1.2, dropout=0.5),
    "large": Size(1500, 35, 55, 0.04, 14, 1 / 1.15, dropout=0.65, clip_norm=10.0),
}


def build_model(vocabulary_size, normalize, arguments, stateful=True):
    """Builds two layers of (BN)LSTM between an embedding and logits of the next word.

    Args:
        vocabulary_size: Number of words.
        normalize: A choice of `--normalize`.
        arguments: Parsed arguments.
        stateful: Whether the layers carry their states from batch to batch.
    """
    size = SIZES[arguments.size]

    def uniform():
        return keras.initializers.RandomUniform(-size.initial, size.initial)

    def recurrent(name):
        shared = {
            "return_sequences": True,
            "stateful": stateful,
            "kernel_initializer": uniform(),
            "recurrent_initializer": uniform(),
            "unit_forget_bias": False,
            "name": name,
        }
        if normalize == "none":
            return keras.layers.LSTM(arguments.units, **shared)
        return keras_bnrnn.BNLSTM(
            arguments.units,
            normalize=normalize,
            statistics=arguments.statistics,
            **shared,
        )

    def dropout():
        return [keras.layers.Dropout(arguments.dropout)] if arguments.dropout else []

    # An initializer draws its seed when it is created: their order is part of a run.
    embeddings, logits = uniform(), uniform()
    model = keras.Sequential(
        [
            keras.Input(
                batch_shape=(arguments.batch_size if stateful else None, None),
                dtype="int32",
                name="ids",
            ),
            keras.layers.Embedding(
                vocabulary_size,
                arguments.units,
                embeddings_initializer=embeddings,
                name="embedding",
            ),
            *dropout(),
            recurrent("lower"),
            *dropout(),
            recurrent("upper"),
            *dropout(),
            keras.layers.Dense(
                vocabulary_size, kernel_initializer=logits, name="logits"
            ),
        ],
        name="language_model",
    )
    model.compile(
        optimizer=keras.optimizers.SGD(
            arguments.learning_rate, global_clipnorm=size.clip_norm
        ),
        loss=cross_entropy,
    )
    return model


def cross_entropy(ids, logits):
    """Returns the cross-entropy of each row, summed over timesteps: (B,), in nats."""
    return ops.sum(
        keras.losses.sparse_categorical_crossentropy(ids, logits, from_logits=True),
        axis=-1,
    )


def copy_weights(source, target):
    """Copies weights by their paths, without the states of stateful layers."""
    values = {weight.path: weight for weight in source.weights}
    for weight in target.weights:
        weight.assign(values[weight.path])
