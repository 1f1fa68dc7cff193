"""Defines the callback that recalibrates a model during `fit`."""

import typing

import keras

from keras_bnrnn.calibration import check_reading, recalibrate
from keras_bnrnn.checks import check_positive_integer, check_verbose


class Recalibrate(keras.callbacks.Callback):
    """Sets exact population statistics before each validation of `fit`.

    The moving averages of training lag behind the weights. With this callback,
    validation, early stopping and checkpoints use the exact statistics of `data`, as
    `recalibrate` computes them. In an epoch without validation the callback acts at the
    end of the epoch. List it before callbacks that save the model. Training continues
    from the new statistics.

    Args:
        data: As for `recalibrate`, usually the training data. It is read in each epoch
            that is due, so it must not be an iterator that ends.
        steps: As for `recalibrate`. A part of a large data set saves time. Default:
            all batches.
        every: Int >= 1. The callback acts in every `every`-th epoch: epochs `every`,
            `2 * every` and so on, counted from 1. Default: 1.
        batch_size: Int, for arrays. Default: 32.
        verbose: 1 for a progress bar, 2 for a line, 0 (default) for silence.

    Attributes:
        changes: Dict from epoch, counted from 0, to what `recalibrate` returned: how
            far the moving averages were from the exact statistics.

    Raises:
        ValueError: If an argument is out of range; in training, as for `recalibrate`.

    Example:

    >>> model = keras.Sequential([keras.Input((None, 8)), BNLSTM(4)])
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 10, 8))
    >>> y = np.zeros((64, 4))
    >>> callbacks = [Recalibrate(x, steps=1)]
    >>> history = model.fit(
    ...     x, y, validation_split=0.25, callbacks=callbacks, verbose=0
    ... )
    >>> sorted(callbacks[0].changes)
    [0]
    """

    def __init__(
        self,
        data: typing.Any,
        steps: int | None = None,
        every: int = 1,
        batch_size: int = 32,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        check_reading(data, steps, batch_size)
        check_positive_integer("every", every)
        check_verbose(verbose)
        self.data = data
        self.steps = steps
        self.every = every
        self.batch_size = batch_size
        self.verbose = verbose
        self.changes: dict[int, dict[str, dict[str, float]]] = {}
        self._due: int | None = None  # the epoch, until the callback has acted in it

    def on_train_begin(self, logs: typing.Any = None) -> None:
        self._due = None

    def on_epoch_begin(self, epoch: int, logs: typing.Any = None) -> None:
        self._due = epoch if (epoch + 1) % self.every == 0 else None

    def on_test_begin(self, logs: typing.Any = None) -> None:
        # Keras validates before `on_epoch_end`.
        self._act()

    def on_epoch_end(self, epoch: int, logs: typing.Any = None) -> None:
        self._act()

    def _act(self):
        if self._due is None:
            return
        epoch, self._due = self._due, None
        self.changes[epoch] = recalibrate(
            self.model, self.data, self.steps, self.batch_size, self.verbose
        )
