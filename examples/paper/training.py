"""Training that continues after an interruption.

`fit` trains a model and writes to one folder

- `log.jsonl`: a line for each epoch, with its losses, metrics, learning rate and
  duration, and with a limit of hours also the course of the loss within the epoch;
- `backup/`: what `keras.callbacks.BackupAndRestore` needs to continue after a kill;
- `configuration.json`: the arguments that the run depends on;
- `tensorboard/`: the same curves for `tensorboard --logdir`;
- `model.weights.h5`: the weights at the end.

The order of the data and the dropout masks of an epoch depend only on the seed and
the number of the epoch. A run that is killed and restarted therefore has the same
curve as an uninterrupted one.
"""

import json
import pathlib
import shutil

import keras
import tensorflow as tf
from run_log import Log, read_log


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
    """Trains a compiled model, or continues the run that `folder` holds.

    Args:
        model: A built and compiled Keras model.
        data: `tf.data.Dataset` of training batches.
        validation_data: The same, to validate on after each epoch.
        folder: Folder of the log, the backup and the weights.
        epochs: Total number of epochs, those of an earlier start included.
        seed: Seed of the dropout masks.
        configuration: Dict of the arguments that the run depends on, without
            `epochs`; written to `configuration.json`.
        callbacks: Further callbacks. The log includes values that they add to the
            logs of an epoch.
        order: The `EpochOrder` that `data` was made with.
        hours: Limit on the training time in hours, without validation. The epoch
            that reaches the limit ends early, is validated and logged, and ends the
            run. `None`: no limit.

    Returns:
        List of the log's rows, a dict for each epoch. With `hours`, each row has
        `losses`, the mean loss of every 50 batches. The row of an epoch that ended
        early has `part`, the trained part of the epoch, in (0, 1].

    Raises:
        SystemExit: If `folder` holds a run with another configuration or with more
            epochs.
    """
    folder = pathlib.Path(folder)
    claim(folder, configuration if hours is None else {**configuration, "hours": hours})
    log = Log(folder / "log.jsonl", hours)
    rows = read_log(log.path)
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
            # Before the backup, so that the log has every epoch of a backup.
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
    """Creates the folder of a run, or checks that it holds a run of these arguments."""
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


class SeedOfEpoch(keras.callbacks.Callback):
    """Sets the dropout seeds in each epoch, because no weights file holds them."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        states = [v for v in self.model.variables if "seed_generator_state" in v.path]
        for number, state in enumerate(states):
            state.assign([self.seed * 1_000 + number, epoch << 20])


class EpochOrder(keras.callbacks.Callback):
    """Shuffles the data in each epoch by the seed and the number of the epoch.

    Example: create `order = EpochOrder(len(rows), seed)`, map the numbers of
    `order.dataset()` to rows, and call `fit(..., order=order)`.
    """

    def __init__(self, count, seed):
        super().__init__()
        self.count, self.seed = count, seed
        self._epoch = tf.Variable(0, dtype=tf.int64, trainable=False)

    def dataset(self):
        """Returns a dataset of the numbers below `count` in the order of the epoch."""

        def shuffled(_):
            seed = tf.stack([tf.constant(self.seed, tf.int64), self._epoch])
            numbers = tf.range(self.count, dtype=tf.int64)
            return tf.data.Dataset.from_tensor_slices(
                tf.random.experimental.stateless_shuffle(numbers, seed)
            )

        # Keras makes one update too many in an epoch of unknown length.
        numbers = tf.data.Dataset.range(1).flat_map(shuffled)
        return numbers.apply(tf.data.experimental.assert_cardinality(self.count))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch.assign(epoch)


class WholeBackup(keras.callbacks.Callback):
    """Restores the previous backup if a kill interrupted the writing of the last one.

    `BackupAndRestore` writes the weights first and then the number of their epoch.
    After a kill between the two it would train the epoch again from its own result.
    """

    def __init__(self, log):
        super().__init__()
        self.log, self._checked = log, False

    def on_epoch_begin(self, epoch, logs=None):
        if self._checked:
            return
        self._checked = True
        rows = read_log(self.log.path)
        done = {row["epoch"]: row["iterations"] for row in rows}.get(epoch, 0)
        if done == int(self.model.optimizer.iterations):
            return
        backup = self.log.path.parent / "backup"
        before = backup / "latest.weights.h5.bkp"
        if before.exists():
            # Keras requires this ending of the file name.
            path = shutil.copy(before, backup / "before.weights.h5")
            self.model.load_weights(path)
        received = int(self.model.optimizer.iterations)
        if done != received:
            raise SystemExit(
                f"{backup} holds weights of update {received}, and says that they are "
                f"of epoch {epoch}, which ended at update {done}. Delete "
                f"{backup.parent} to start afresh."
            )


def print_table(rows, columns, form):
    """Prints a line for each epoch.

    The training values are means over the epoch, while the weights change.

    Args:
        rows: The rows that `fit` returned.
        columns: Dict from a name in the rows to the title of its column.
        form: Format of the values, such as `13.4f`.
    """
    width = form.partition(".")[0]
    print("\nepoch" + "".join(f"{title:>{width}}" for title in columns.values()))
    for row in rows:
        print(f"{row['epoch']:5}" + "".join(f"{row[name]:{form}}" for name in columns))
    print()


def write_results(output_dir, results):
    """Writes `results.json` and prints its path."""
    path = pathlib.Path(output_dir) / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"Results: {path}")
