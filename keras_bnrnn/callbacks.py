"""Defines the callbacks that recalibrate or monitor a model during `fit`."""

import os
import reprlib
import typing
import warnings

import keras
import numpy as np

from keras_bnrnn import backend
from keras_bnrnn.calibration import check_reading, recalibrate
from keras_bnrnn.checks import check_positive_integer, check_verbose, is_number
from keras_bnrnn.extras import require_extra
from keras_bnrnn.monitoring import Probe
from keras_bnrnn.targets import is_array


class _AfterTraining(keras.callbacks.Callback):
    """Acts after the training steps of an epoch, before its validation.

    In an epoch without validation the callback acts at the end of the epoch.

    Args:
        every: Int >= 1. The callback acts in every `every`-th epoch.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        check_positive_integer("every", every)
        self.every = every
        self._due: int | None = None  # the epoch, until the callback has acted in it

    def on_train_begin(self, logs: typing.Any = None) -> None:
        self._due = None

    def on_epoch_begin(self, epoch: int, logs: typing.Any = None) -> None:
        self._due = epoch if (epoch + 1) % self.every == 0 else None

    def on_test_begin(self, logs: typing.Any = None) -> None:
        # Keras validates before `on_epoch_end`.
        self._act_once()

    def on_epoch_end(self, epoch: int, logs: typing.Any = None) -> None:
        self._act_once()

    def _act_once(self):
        if self._due is not None:
            epoch, self._due = self._due, None
            self._act(epoch)

    def _act(self, epoch):
        raise NotImplementedError


class Recalibrate(_AfterTraining):
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
        super().__init__(every)
        check_reading(data, steps, batch_size)
        check_verbose(verbose)
        self.data = data
        self.steps = steps
        self.batch_size = batch_size
        self.verbose = verbose
        self.changes: dict[int, dict[str, dict[str, float]]] = {}

    def _act(self, epoch):
        self.changes[epoch] = recalibrate(
            self.model, self.data, self.steps, self.batch_size, self.verbose
        )


class NormalizationMonitor(_AfterTraining):
    """Measures normalisation and gates on one batch, after the training of an epoch.

    For each normalised site of the model the callback measures, with
    `model(x, training=False)`:

    - The gap between the statistics of the batch and the population statistics, in each
      feature: `|E_batch - E_population| / sqrt(Var_population + epsilon)` for the mean,
      a number of standard deviations, and
      `|ln((Var_batch + epsilon) / (Var_population + epsilon))|` for the variance. A gap
      means that training and inference compute different outputs with equal weights.
      The batch is normalised in groups as in training: all valid frames together, or
      each timestep alone if statistics are frame-wise. The gap is then the mean over
      the timesteps, weighted by their valid frames.
    - gamma, the learnt scale.
    - The share of saturated gates: the part of the values of a gate, over all units and
      valid frames, that are closer than `margin` to a bound of its activation. Hardly
      any gradient passes through a saturated gate.

    The measurements are in `history`. With `log_dir` they are also written for
    TensorBoard, with the epoch as the step: a scalar `LAYER/KEY` for each key of
    `history`, and a histogram `LAYER/gamma`. Use the folder of
    `keras.callbacks.TensorBoard` to see them beside the losses. Draw them with
    `keras_bnrnn.plots.plot_normalization`.

    The callback does not change the model: neither weights and statistics, nor the
    states of optimizers, stateful layers and seed generators. It runs a graph of its
    own, once at the start of training and once in each epoch that is due.

    The callback acts where `Recalibrate` acts, before validation, and in the order of
    the list of callbacks. List it before `Recalibrate` to see how far the moving
    averages are, and after it to see what validation uses.

    Args:
        batch: `x`, or a tuple `(x, y)` or `(x, y, sample_weight)`, of arrays or
            tensors. Only x is used. The mask of the model excludes padding. For a model
            with several inputs x is a list or a dict. Frame-wise statistics need more
            than one row.
        log_dir: The path of a folder for TensorBoard. Default: `None`, nothing is
            written. It needs the package `tensorboard`.
        every: Int >= 1. The callback acts in every `every`-th epoch: epochs `every`,
            `2 * every` and so on, counted from 1. Default: 1.
        margin: Float in (0, 0.5). Default: 0.05. A sigmoid is then saturated below 0.05
            and above 0.95, a tanh below -0.95 and above 0.95.

    Attributes:
        history: Dict from epoch, counted from 0, to a dict from layer name to the
            measurements, a dict of floats with these keys: `"mean_gap/mean"`,
            `"mean_gap/max"`, `"variance_gap/mean"` and `"variance_gap/max"`, over the
            features; `"gamma/mean"`, `"gamma/min"` and `"gamma/max"`; for each gate,
            such as `f`, `"saturated/f/low"` and `"saturated/f/high"`, the shares at
            each bound, and their sum `"saturated/f"`. Layers are named as by
            `recalibrate`. NaN stands for what is not finite.
        unmeasured: Dict from layer name to the reason why gates are not measured: a
            cell of your own that does not declare `gate_activations`, or an activation
            without known bounds, such as `"relu"`.

    Raises:
        ValueError: If an argument is out of range. At the start of training, if the
            model has no normalised layer, or if a layer receives no valid frame, a
            value that is not finite, or, with frame-wise statistics, a single row.
        ImportError: If `log_dir` is given and `tensorboard` is not installed.

    Example:

    >>> model = keras.Sequential([keras.Input((None, 8)), BNLSTM(4, name="lstm")])
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 10, 8))
    >>> y = np.zeros((64, 4))
    >>> monitor = NormalizationMonitor((x[:32], y[:32]))
    >>> history = model.fit(x, y, callbacks=[monitor], verbose=0)
    >>> 0 <= monitor.history[0]["lstm"]["saturated/f"] <= 1
    True
    """

    def __init__(
        self,
        batch: typing.Any,
        log_dir: str | os.PathLike[str] | None = None,
        every: int = 1,
        margin: float = 0.05,
    ) -> None:
        super().__init__(every)
        _check_batch(batch)
        if not is_number(margin) or not 0.0 < margin < 0.5:
            raise ValueError(
                f"`margin` must be in (0, 0.5). Received: margin={margin!r}"
            )
        if log_dir is not None:
            if not isinstance(log_dir, (str, os.PathLike)):
                raise ValueError(
                    "`log_dir` must be the path of a folder, or None. "
                    f"Received: log_dir={log_dir!r}"
                )
            require_extra("NormalizationMonitor(log_dir=...)", "plots", ["tensorboard"])
        self.batch = batch
        self.log_dir = log_dir
        self.margin = float(margin)
        self.history: dict[int, dict[str, dict[str, float]]] = {}
        self.unmeasured: dict[str, str] = {}
        self._probe: Probe | None = None
        self._writer: typing.Any = None

    def on_train_begin(self, logs: typing.Any = None) -> None:
        super().on_train_begin(logs)
        self._probe = Probe(self.model, self.batch, self.margin)
        self.unmeasured = self._probe.unmeasured
        if self._probe.silent:
            warnings.warn(
                "Not monitored, never called on the batch: "
                + ", ".join(self._probe.silent),
                stacklevel=2,
            )
        if self.unmeasured:
            reasons = [f"{name}: {why}" for name, why in self.unmeasured.items()]
            warnings.warn(
                f"Gates that are not measured: {'; '.join(reasons)}", stacklevel=2
            )
        if self.log_dir is not None:
            self._writer = backend.summary_writer(self.log_dir)

    def on_train_end(self, logs: typing.Any = None) -> None:
        self._probe = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _act(self, epoch):
        measured = self._probe()
        self.history[epoch] = measured
        if self._writer is None:
            return
        scalars = {
            f"{layer}/{key}": value
            for layer, values in measured.items()
            for key, value in values.items()
        }
        histograms = {
            f"{layer}/gamma": gamma
            for layer, gamma in self._probe.gammas().items()
            if np.isfinite(gamma).all()
        }
        backend.write_summaries(self._writer, scalars, histograms, epoch)


def _check_batch(batch):
    """Raises an error unless a batch consists of arrays."""
    x = batch
    if isinstance(batch, tuple):
        x = batch[0] if 1 <= len(batch) <= 3 else ()
    leaves = keras.tree.flatten(x)
    if not leaves or not all(is_array(leaf) for leaf in leaves):
        raise ValueError(
            "`batch` must be one batch of arrays or tensors, `x` or `(x, y, ...)`, "
            f"such as `next(iter(dataset))`. Received: batch={reprlib.repr(batch)}"
        )
