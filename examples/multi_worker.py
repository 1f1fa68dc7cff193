"""Trains one model in several processes, and continues after a crash.

Each worker runs this program with the environment variable TF_CONFIG, which has the
addresses of all workers and the number of this one. The workers share the folder
`--output-dir`. To try it on one machine, give `--local-workers 2`: the program then
starts the workers itself, and starts them again if one of them ends with an error.

The model classifies scikit-learn's images of digits, row by row. It trains with
`model.fit` and `tf.distribute.MultiWorkerMirroredStrategy`, and all workers share the
statistics of a batch. After each epoch worker 0, the chief, writes a checkpoint. If a
worker is killed, the others end with an error. Start all of them again: they continue
from the last checkpoint. At the end the chief computes exact population statistics of
the training data, prints the test accuracy and writes `model.keras`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from migrate_digits import digits

import keras_bnrnn

RESTARTS = 3  # of --local-workers


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", default="runs/workers", help="(default: runs/workers)")
    add("--units", type=int, default=64, help="units of the LSTM (default: 64)")
    add("--epochs", type=int, default=20, help="in total (default: 20)")
    add("--batch-size", type=int, default=64, help="of all workers (default: 64)")
    add("--learning-rate", type=float, default=1e-3, help="of Adam (default: 1e-3)")
    add("--seed", type=int, default=1, help="(default: 1)")
    add(
        "--local-workers", type=int, default=0, metavar="N", help="start N workers here"
    )
    add("--smoke", action="store_true", help="4 units, 2 epochs: a trial")
    options = parser.parse_args(argv)
    if options.local_workers < 0:
        parser.error(f"--local-workers: must be at least 0. Received: {argv}")
    if options.local_workers:
        arguments = sys.argv[1:] if argv is None else argv
        return run_local_workers(options.local_workers, arguments)
    if options.smoke:
        options.units, options.epochs = 4, 2
    try:
        return train(options)
    except tf.errors.UnavailableError:
        print(
            "error: another worker has ended. Start all workers again: they continue "
            "from the last checkpoint",
            file=sys.stderr,
        )
        return 1


def train(options):
    # TensorFlow needs the strategy before it computes anything.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    replicas = strategy.num_replicas_in_sync
    if options.batch_size % replicas:
        raise SystemExit(
            f"error: --batch-size must be a multiple of the {replicas} replicas. "
            f"Received: {options.batch_size}"
        )
    chief = strategy.cluster_resolver.task_id in (None, 0)
    output = pathlib.Path(options.output_dir)
    # All workers start with the same weights.
    keras.utils.set_random_seed(options.seed)
    model = build_distributed_model(strategy, options)
    (x, y), test = digits(options.seed)

    with tempfile.TemporaryDirectory() as temporary:
        # All workers write checkpoints, because TensorFlow reads some variables from
        # all of them. Only those of the chief are kept.
        folder = output if chief else pathlib.Path(temporary)
        checkpoints = Checkpoints(model, folder / "checkpoints")
        epoch = checkpoints.restore(output / "checkpoints")
        if chief:
            print(f"{replicas} replicas; epochs that are done: {epoch}", flush=True)
        batches = shuffled_batches(x, y, epoch, options)
        model.fit(
            strategy.experimental_distribute_dataset(batches),
            # One batch: a part of it for each replica.
            validation_data=strategy.experimental_distribute_dataset(
                tf.data.Dataset.from_tensors(test)
            ),
            initial_epoch=epoch,
            epochs=options.epochs,
            steps_per_epoch=len(x) // options.batch_size,
            callbacks=[checkpoints],
            shuffle=False,  # shuffled_batches has done so
            verbose=2 if chief else 0,
        )
    if chief:
        finish(model, x, test, options)
    return 0


def build_model(options):
    inputs = keras.Input((8, 8))
    x = keras_bnrnn.BNLSTM(options.units, return_sequences=True, synchronized=True)(
        inputs
    )
    x = keras_bnrnn.BNLSTM(options.units, synchronized=True)(x)
    outputs = keras.layers.Dense(10, activation="softmax")(x)
    return keras.Model(inputs, outputs)


def build_distributed_model(strategy, options):
    """Builds a compiled model whose `fit` runs on all replicas.

    Everything that has variables is made in the scope of the strategy. The model itself
    is not: `fit` fails with a model that is made in the scope of this strategy.
    """
    with strategy.scope():
        plain = build_model(options)
        optimizer = keras.optimizers.Adam(options.learning_rate)
        optimizer.build(plain.trainable_variables)
    model = DistributedModel(plain.inputs, plain.outputs)
    model.strategy = strategy
    with strategy.scope():
        model.compile(
            optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"]
        )
    return model


class DistributedModel(keras.Model):
    """A model whose `fit` and `evaluate` run on the replicas of `strategy`.

    The data must be a distributed data set of the strategy.
    """

    strategy = None

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            self.train_function = self._on_replicas(self.train_step)

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self.test_function = self._on_replicas(self.test_step)

    def _on_replicas(self, step):
        @tf.function
        def function(iterator):
            logs = self.strategy.run(step, (next(iterator),))
            return {
                name: self.strategy.reduce("mean", value, axis=None)
                for name, value in logs.items()
            }

        return function


class Checkpoints(keras.callbacks.Callback):
    """Writes a checkpoint after each epoch: weights, optimizer and number of epochs.

    Args:
        model: A compiled Keras model.
        folder: Folder of the checkpoints of this worker.
    """

    def __init__(self, model, folder):
        super().__init__()
        self.epoch = tf.Variable(0, trainable=False)
        self.checkpoint = tf.train.Checkpoint(
            model=model, optimizer=model.optimizer, epoch=self.epoch
        )
        self.manager = tf.train.CheckpointManager(
            self.checkpoint, str(folder), max_to_keep=2
        )

    def restore(self, folder):
        """Restores the last checkpoint of a folder.

        Returns:
            int, the number of epochs that are done. 0 without a checkpoint.
        """
        path = tf.train.latest_checkpoint(str(folder))
        if path is not None:
            self.checkpoint.restore(path).assert_existing_objects_matched()
        return int(self.epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.epoch.assign(epoch + 1)
        self.manager.save()


def shuffled_batches(x, y, epoch, options):
    """Returns the batches of all workers, from an epoch on.

    The order in an epoch depends on the seed and the number of the epoch only. All
    workers have the same order, also after a restart.
    """

    def order(epoch):
        rows = tf.range(len(x), dtype=tf.int64)
        rows = tf.random.experimental.stateless_shuffle(rows, [options.seed, epoch])
        rows = tf.data.Dataset.from_tensor_slices(rows)
        return rows.batch(options.batch_size, drop_remainder=True)

    x, y = tf.constant(x), tf.constant(y)
    batches = tf.data.Dataset.range(epoch, options.epochs).flat_map(order)
    return batches.map(lambda rows: (tf.gather(x, rows), tf.gather(y, rows)))


def finish(model, x, test, options):
    """Recalibrates a copy of the model that knows no strategy, and saves it."""
    plain = build_model(options)
    plain.set_weights(model.get_weights())
    keras_bnrnn.recalibrate(plain, x, verbose=0)
    plain.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    loss, accuracy = plain.evaluate(*test, batch_size=len(test[0]), verbose=0)
    print(f"test accuracy {accuracy:.4f}, test loss {loss:.4f}")
    path = pathlib.Path(options.output_dir) / "model.keras"
    plain.save(path)
    print(f"Model: {path}")


def run_local_workers(count, arguments):
    """Runs workers on this machine, and restarts all if one ends with an error."""
    for start in range(1 + RESTARTS):
        if start:
            print("Starting all workers again", flush=True)
        workers = start_workers(count, arguments)
        try:
            while None in (codes := [worker.poll() for worker in workers]):
                if any(codes):
                    break
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if not any(codes):
            return 0
        ended = next(index for index, code in enumerate(codes) if code)
        print(f"Worker {ended} ended with status {codes[ended]}", flush=True)
    return 1


def start_workers(count, arguments):
    """Starts this program `count` times, with the TF_CONFIG of each worker."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))  # a free port
        addresses = ["{}:{}".format(*s.getsockname()) for s in sockets]
    workers = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        workers.append(
            subprocess.Popen(
                [sys.executable, sys.argv[0], *arguments, "--local-workers", "0"],
                env={**os.environ, "TF_CONFIG": config},
            )
        )
    return workers


if __name__ == "__main__":
    sys.exit(main())
