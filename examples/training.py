"""What the examples share: training that can be killed, and a log of its epochs.

`fit` trains a model and writes, in one folder,

- `log.jsonl`: a line for each epoch, with its losses, metrics, learning rate and
  the seconds it took;
- `backup/`: what `keras.callbacks.BackupAndRestore` needs to go on after a kill;
- `configuration.json`: the arguments that the run depends on;
- `tensorboard/`: the same curves for `tensorboard --logdir`;
- `model.weights.h5`: the weights at the end.

Whatever an epoch draws by chance, the order of the data and dropout masks, depends
on the seed and the number of the epoch alone: a run that is killed and restarted
ends with the curve of one that was not.
"""

import argparse
import json
import pathlib
import shutil
import time

import keras
import tensorflow as tf


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
    add("--seed", type=int, default=1, help="of all that is by chance (default: 1)")
    add("--smoke", action="store_true", help="seconds instead of minutes: a trial")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1). Received: {text}")
    return value


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

    Returns:
        List of the log's rows, a dict for each epoch.

    Raises:
        SystemExit: If `folder` holds a run of another configuration, or one of more
            epochs.
    """
    folder = pathlib.Path(folder)
    claim(folder, configuration)
    log = Log(folder / "log.jsonl")
    there = len(read_log(log.path)) if log.path.exists() else 0
    if there > epochs:
        raise SystemExit(
            f"{folder} holds a run of {there} epochs, and its weights are those of the "
            f"last one. Received: --epochs {epochs}. Give another --output-dir, or "
            "delete that folder."
        )
    if there:
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
    """

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter(), time.process_time()
        self._took = None

    def on_test_begin(self, logs=None):
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()
        seconds, cpu_seconds = self._took
        row = {
            "epoch": epoch + 1,
            "iterations": int(self.model.optimizer.iterations),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "learning_rate": float(self.model.optimizer.learning_rate),
        }
        row |= {name: float(value) for name, value in (logs or {}).items()}
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")

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
