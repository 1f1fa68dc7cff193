"""What the examples share: training that can be killed, and a log of its epochs.

`fit` trains a model and writes, in one folder,

- `log.jsonl`: a line for each epoch, with its losses, metrics, learning rate and
  the seconds it took; with a limit of hours, how the loss went within it, too;
- `backup/`: what `keras.callbacks.BackupAndRestore` needs to go on after a kill;
- `configuration.json`: the arguments that the run depends on;
- `tensorboard/`: the same curves for `tensorboard --logdir`;
- `model.weights.h5`: the weights at the end.

Whatever an epoch draws by chance, the order of the data and dropout masks, depends
on the seed and the number of the epoch alone: a run that is killed and restarted
ends with the curve of one that was not.
"""

import argparse
import itertools
import json
import pathlib
import shutil
import time

import keras
import tensorflow as tf

BATCHES_A_MEAN = 50  # of the training loss within an epoch


def add_arguments(parser, *, output_dir, epochs):
    """The arguments that every example takes."""
    add = parser.add_argument
    add(
        "--output-dir",
        default=output_dir,
        help=f"for all that is written (default: {output_dir})",
    )
    add(
        "--epochs",
        type=positive,
        default=epochs,
        help=f"in all; a run that is there goes on (default: {epochs or 'by size'})",
    )
    add(
        "--hours",
        type=positive_float,
        help="of training, after which it stops, within an epoch if need be (default: "
        "no limit)",
    )
    add("--seed", type=int, default=1, help="of all that is by chance (default: 1)")
    add("--smoke", action="store_true", help="seconds instead of minutes: a trial")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0. Received: {text}")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1). Received: {text}")
    return value


def missing(error):
    """The message of an example that lacks a package.

    Args:
        error: The `ImportError`.

    Returns:
        str, one line.
    """
    return f"error: {error} (the examples need `pip install 'keras-bnrnn[examples]'`)"


def fit(
    model,
    data,
    validation_data,
    *,
    folder,
    epochs,
    seed,
    configuration,
    callbacks=(),
    order=None,
    hours=None,
):
    """Trains a compiled model, or what is left of a run that `folder` has the start of.

    Args:
        model: A built and compiled Keras model.
        data: `tf.data.Dataset` of training batches.
        validation_data: The same, to validate on after each epoch.
        folder: Where the log, the backup and the weights go.
        epochs: Epochs in all, those of an earlier start included.
        seed: Of dropout masks.
        configuration: Dict of what the run depends on, less `epochs`; written to
            `configuration.json`.
        callbacks: Further callbacks. What they add to the logs of an epoch is logged.
        order: An `EpochOrder` that `data` was made with.
        hours: Of training in all, validation left out, after which it stops. The epoch
            that this cuts short is validated and logged as it is, and the run is at
            its end. None: no limit.

    Returns:
        List of the log's rows, a dict for each epoch. With `hours`, each has `losses`,
        the means over every 50 batches, and the one that was cut short has `part`,
        what was trained of the epoch, in (0, 1].

    Raises:
        SystemExit: If `folder` holds a run of another configuration, or one of more
            epochs.
    """
    folder = pathlib.Path(folder)
    claim(folder, configuration if hours is None else {**configuration, "hours": hours})
    log = Log(folder / "log.jsonl", hours)
    rows = read_log(log.path) if log.path.exists() else []
    there = len(rows)
    if there > epochs:
        raise SystemExit(
            f"{folder} holds a run of {there} epochs, and its weights are those of the "
            f"last one. Received: --epochs {epochs}. Give another --output-dir, or "
            "delete that folder."
        )
    if there and "part" in rows[-1]:
        print(f"{folder} holds a run that was stopped after {hours:g} h")
        epochs = there
    elif there:
        print(f"{folder} holds {there} of {epochs} epochs: going on from there")
    model.fit(
        data,
        validation_data=validation_data,
        epochs=epochs,
        shuffle=False,
        callbacks=[
            *callbacks,
            SeedOfEpoch(seed),
            *([order] if order is not None else []),
            # Before the backup: an epoch that is backed up is in the log.
            log,
            keras.callbacks.BackupAndRestore(
                folder / "backup", double_checkpoint=True, delete_checkpoint=False
            ),
            WholeBackup(log),
            keras.callbacks.TensorBoard(folder / "tensorboard", write_graph=False),
        ],
    )
    model.save_weights(folder / "model.weights.h5")
    return read_log(log.path)


def claim(folder, configuration):
    """Makes the folder of a run, or finds that it is this one's."""
    path = folder / "configuration.json"
    configuration = json.loads(json.dumps(configuration))
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(
            name
            for name in {*there, *configuration}
            if there.get(name) != configuration.get(name)
        )
        if differing:
            raise SystemExit(
                f"{folder} holds a run with other arguments: "
                + ", ".join(
                    f"{name}={there.get(name)!r}, now {configuration.get(name)!r}"
                    for name in differing
                )
                + ". Give another --output-dir, or delete that folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")


def read_log(path):
    """The rows of a log, one for each epoch, in their order.

    A run that was killed between the log and the backup repeats its last epoch; the
    repetition counts. A line that the kill cut off does not.
    """
    rows = {}
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


class Log(keras.callbacks.Callback):
    """Appends a line of JSON for each epoch.

    `seconds` and `cpu_seconds` are those of training, validation left out; the
    second counts all threads of this process, and other programs do not slow it.

    Args:
        path: Of the log.
        hours: The sum of `seconds` at which training stops; None: it does not.
    """

    def __init__(self, path, hours=None):
        super().__init__()
        self.path, self.hours = pathlib.Path(path), hours

    def on_train_begin(self, logs=None):
        rows = read_log(self.path) if self.path.exists() else []
        self._seconds = {row["epoch"]: row["seconds"] for row in rows}

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter(), time.process_time()
        self._took = None
        self._means, self._part = [(0, 0.0)], None
        # An epoch that is trained again does not count twice.
        before = sum(s for number, s in self._seconds.items() if number <= epoch)
        if self.hours is not None:
            self._until = self._began[0] + 3600 * self.hours - before

    def on_train_batch_end(self, batch, logs=None):
        if self.hours is None:
            return
        if time.perf_counter() >= self._until:
            self._part = (batch + 1) / self.params["steps"]
            self.model.stop_training = True
        if (batch + 1) % BATCHES_A_MEAN == 0:
            self._means.append((batch + 1, float(logs["loss"])))

    def on_test_begin(self, logs=None):
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()
        seconds, cpu_seconds = self._took
        self._seconds[epoch + 1] = seconds
        row = {
            "epoch": epoch + 1,
            "iterations": int(self.model.optimizer.iterations),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "learning_rate": float(self.model.optimizer.learning_rate),
        }
        row |= {name: float(value) for name, value in (logs or {}).items()}
        if self.hours is not None:
            row["losses"] = self._losses()
        if self._part is not None:
            row["part"] = self._part
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")

    def _losses(self):
        """Keras' means are over the epoch so far; these, over the batches since."""
        return [
            (mean * count - before * already) / (count - already)
            for (already, before), (count, mean) in itertools.pairwise(self._means)
        ]

    def _stop(self):
        if self._took is None:
            wall, cpu = self._began
            self._took = time.perf_counter() - wall, time.process_time() - cpu


class SeedOfEpoch(keras.callbacks.Callback):
    """Gives dropout's seeds, which no weights file holds, a value for each epoch."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        states = [v for v in self.model.variables if "seed_generator_state" in v.path]
        for number, state in enumerate(states):
            state.assign([self.seed * 1_000 + number, epoch << 20])


class EpochOrder(keras.callbacks.Callback):
    """An order of the data for each epoch, by the seed and the epoch's number.

    Example: `order = EpochOrder(len(rows), seed)`, then a dataset that maps the
    numbers of `order.dataset()` to rows, and `fit(..., order=order)`.
    """

    def __init__(self, count, seed):
        super().__init__()
        self.count, self.seed = count, seed
        self._epoch = tf.Variable(0, dtype=tf.int64, trainable=False)

    def dataset(self):
        """Dataset of int64 numbers below `count`, in the order of the epoch."""

        def shuffled(_):
            seed = tf.stack([tf.constant(self.seed, tf.int64), self._epoch])
            numbers = tf.range(self.count, dtype=tf.int64)
            return tf.data.Dataset.from_tensor_slices(
                tf.random.experimental.stateless_shuffle(numbers, seed)
            )

        # Keras trains one step too many in an epoch whose length it does not know.
        numbers = tf.data.Dataset.range(1).flat_map(shuffled)
        return numbers.apply(tf.data.experimental.assert_cardinality(self.count))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch.assign(epoch)


class WholeBackup(keras.callbacks.Callback):
    """Takes the backup before the last where a kill tore the last one.

    `BackupAndRestore` writes weights first and then the number of their epoch. After a
    kill between the two it would train the epoch again, on top of its own result.
    """

    def __init__(self, log):
        super().__init__()
        self.log, self._checked = log, False

    def on_epoch_begin(self, epoch, logs=None):
        if self._checked:
            return
        self._checked = True
        rows = read_log(self.log.path) if self.log.path.exists() else []
        done = {row["epoch"]: row["iterations"] for row in rows}.get(epoch, 0)
        if done == int(self.model.optimizer.iterations):
            return
        backup = self.log.path.parent / "backup"
        before = backup / "latest.weights.h5.bkp"
        if before.exists():
            # Keras loads no file of another name.
            path = shutil.copy(before, backup / "before.weights.h5")
            self.model.load_weights(path)
        received = int(self.model.optimizer.iterations)
        if done != received:
            raise SystemExit(
                f"{backup} holds weights of update {received}, and says that they are "
                f"of epoch {epoch}, which ended at update {done}. Delete "
                f"{backup.parent} to start afresh."
            )
