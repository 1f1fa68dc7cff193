"""The log of a training run: one line of JSON for each epoch."""

import itertools
import json
import pathlib
import time

import keras

BATCHES_A_MEAN = 50  # of the training loss within an epoch


def read_log(path):
    """Returns the rows of a log in the order of the epochs; none without a file.

    A run that was killed between the log and the backup repeats its last epoch. Then
    the later row counts. A line that a kill cut off is left out.
    """
    rows, path = {}, pathlib.Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


class Log(keras.callbacks.Callback):
    """Appends a line of JSON for each epoch.

    `seconds` and `cpu_seconds` measure training without validation. `cpu_seconds`
    counts all threads of this process and does not depend on other programs.

    Args:
        path: Path of the log.
        hours: Training stops when the sum of `seconds` reaches this. `None`: no limit.
    """

    def __init__(self, path, hours=None):
        super().__init__()
        self.path, self.hours = pathlib.Path(path), hours

    def on_train_begin(self, logs=None):
        self._seconds = {row["epoch"]: row["seconds"] for row in read_log(self.path)}

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter(), time.process_time()
        self._took = None
        self._means, self._part = [(0, 0.0)], None
        # The time of an epoch that is trained again counts once.
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
        """Turns Keras' running means of the epoch into means of 50 batches each."""
        return [
            (mean * count - before * already) / (count - already)
            for (already, before), (count, mean) in itertools.pairwise(self._means)
        ]

    def _stop(self):
        if self._took is None:
            wall, cpu = self._began
            self._took = time.perf_counter() - wall, time.process_time() - cpu
