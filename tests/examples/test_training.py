"""Runs that continue after a kill, and their logs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

PAPER = pathlib.Path(__file__).parents[2] / "examples" / "paper"
DURATIONS = ("seconds", "cpu_seconds")
COUNT, FEATURES = 12, 3


@pytest.fixture(scope="module")
def training(paper):
    return paper("training")


@pytest.fixture(scope="module")
def run_log(paper):
    return paper("run_log")


@pytest.fixture
def fit(training, rng):
    """Trains a small model with dropout and momentum on shuffled rows."""
    x = rng.normal(size=(COUNT, FEATURES)).astype("float32")
    y = rng.normal(size=(COUNT, 1)).astype("float32")

    def fit(folder, epochs, callbacks=(), hours=None, **configuration):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(4),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(1),
            ]
        )
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        # XLA would take longer to compile the model than the runs take.
        model.compile(optimizer, "mse", jit_compile=False)
        order = training.EpochOrder(COUNT, seed=7)
        data = order.dataset().map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
        rows = training.fit(
            *(model, data.batch(4), tf.data.Dataset.from_tensors((x, y))),
            folder=folder,
            epochs=epochs,
            seed=5,
            configuration=configuration,
            callbacks=callbacks,
            order=order,
            hours=hours,
        )
        return model, rows

    return fit


def curve(rows):
    return [{k: v for k, v in row.items() if k not in DURATIONS} for row in rows]


class Stop(keras.callbacks.Callback):
    """Fails in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, 1):
            raise KeyboardInterrupt


def test_a_stopped_run_ends_as_one_that_was_not(fit, tmp_path, capsys):
    model, rows = fit(tmp_path / "whole", 4)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", 4, [Stop(2)])
    again, received = fit(tmp_path / "stopped", 4)
    assert "holds 2 of 4 epochs: going on from there" in capsys.readouterr().out
    assert [row["iterations"] for row in rows] == [3, 6, 9, 12]
    # To the last bit: the same operations on the same numbers.
    assert curve(received) == curve(rows)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    # A run that is at its end trains no more.
    assert curve(fit(tmp_path / "whole", 4)[1]) == curve(rows)
    saved = keras.models.clone_model(model)
    saved.load_weights(tmp_path / "whole" / "model.weights.h5")
    np.testing.assert_array_equal(saved.get_weights()[0], model.get_weights()[0])
    events = list((tmp_path / "whole" / "tensorboard").glob("*/events*"))
    assert len(events) >= 2  # training and validation


def test_each_epoch_has_masks_of_its_own(training):
    layer = keras.layers.Dropout(0.5)
    model = keras.Sequential([keras.Input((64,)), layer])
    callback = training.SeedOfEpoch(5)
    callback.set_model(model)
    ones = np.ones((8, 64), "float32")

    def masks(epoch):
        callback.on_epoch_begin(epoch)
        return [np.array(layer(ones, training=True)) for _ in range(2)]

    first, second = masks(0), masks(1)
    for one, other in zip(first, masks(0), strict=True):
        np.testing.assert_array_equal(one, other)
    different = [*first, *second]
    for number, one in enumerate(different):
        for other in different[:number]:
            assert np.any(one != other)


def test_each_epoch_has_an_order_of_its_own(training):
    def orders(seed):
        order = training.EpochOrder(50, seed)
        data = order.dataset()
        assert data.cardinality() == 50
        read = []
        for epoch in (0, 1, 0):
            order.on_epoch_begin(epoch)
            read.append([int(number) for number in data])
        return read

    first, second, again = orders(1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first == again and first != second and first != list(range(50))
    assert orders(2)[0] not in (first, second)


def test_a_torn_backup_gives_way_to_the_one_before(fit, tmp_path):
    _, rows = fit(tmp_path / "whole", 3)
    torn, backup = tmp_path / "torn", tmp_path / "torn" / "backup"
    fit(torn, 1)
    first = {path.name: path.read_bytes() for path in backup.iterdir()}
    fit(torn, 2)
    # A kill after the weights of epoch 2, before its number.
    name = "training_metadata.json"
    (backup / name).write_bytes(first[name])
    (backup / f"{name}.bkp").write_bytes(first[name])
    received = fit(torn, 3)[1]
    assert curve(received) == curve(rows)

    (backup / name).write_bytes(first[name])
    with pytest.raises(SystemExit, match=r"weights of update 6, .* of epoch 1, .* 3\."):
        fit(torn, 3)


def test_the_first_backup_may_be_torn_too(fit, tmp_path):
    fit(tmp_path, 1)
    (tmp_path / "backup" / "training_metadata.json").unlink()
    with pytest.raises(SystemExit, match=r"update 3, .* epoch 0, .* update 0"):
        fit(tmp_path, 2)


def test_a_line_that_a_kill_cut_off_is_no_row(fit, run_log, tmp_path):
    _, rows = fit(tmp_path, 2)
    log = tmp_path / "log.jsonl"
    line = log.read_text().splitlines()[1]
    log.write_text(log.read_text() + line.replace('"loss": ', '"loss": 9') + "\n")
    repeated = run_log.read_log(log)
    assert len(repeated) == 2 and repeated[1]["loss"] > 90  # the repetition counts
    log.write_text(log.read_text() + line[:20])
    assert run_log.read_log(log) == repeated
    longer = fit(tmp_path, 3)[1]
    assert [row["epoch"] for row in longer] == [1, 2, 3]
    assert curve(longer[:1]) == curve(rows[:1])


def test_rows_have_what_an_epoch_took(fit, tmp_path):
    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.1)

        def on_test_batch_end(self, batch, logs=None):
            time.sleep(0.5)

    (row,) = fit(tmp_path, 1, [Slow()])[1]
    fast = fit(tmp_path, 2)[1][1]
    # Three batches; validation is not counted.
    assert row["seconds"] >= 0.3
    assert fast["seconds"] < 10
    assert {"loss", "val_loss", "cpu_seconds", "learning_rate"} <= set(row)


class Clock:
    """Stands still, but for what is waited."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def wait(self):
        """Callback: an hour for each batch."""
        return keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: self._hour()
        )

    def _hour(self):
        self.now += 3600


def test_hours_end_a_run_within_an_epoch(fit, run_log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "BATCHES_A_MEAN", 1)
    whole = fit(tmp_path / "whole", 2)[1]
    wait = Clock(monkeypatch).wait()
    model, rows = fit(tmp_path / "short", 9, [wait], hours=5)
    # Three batches an epoch: the fifth hour ends in the middle of the second.
    assert [row["iterations"] for row in rows] == [3, 5]
    assert "part" not in rows[0] and rows[1]["part"] == pytest.approx(2 / 3)
    assert rows[0]["loss"] == whole[0]["loss"]
    assert {"val_loss", "learning_rate"} <= set(rows[1])
    for row in rows:
        # A mean of each batch, and Keras' mean of them all: float32 sums.
        assert np.mean(row["losses"]) == pytest.approx(row["loss"], rel=1e-5)
    assert len(rows[0]["losses"]) == 3 and len(rows[1]["losses"]) == 2
    assert len(set(rows[0]["losses"])) == 3
    saved = keras.models.clone_model(model)
    saved.load_weights(tmp_path / "short" / "model.weights.h5")

    # It is at its end, with the weights that it had, whatever time there is.
    again, received = fit(tmp_path / "short", 9, [wait], hours=5)
    assert "stopped after 5 h" in capsys.readouterr().out
    assert received == rows
    for one, other in zip(again.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(SystemExit, match=r"hours=5, now 7"):
        fit(tmp_path / "short", 9, hours=7)
    with pytest.raises(SystemExit, match=r"hours=5, now None"):
        fit(tmp_path / "short", 9)


def test_hours_before_a_kill_count(fit, tmp_path, monkeypatch):
    whole_clock = Clock(monkeypatch)
    _, whole = fit(tmp_path / "whole", 9, [whole_clock.wait()], hours=8)
    clock = Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", 9, [clock.wait(), Stop(1)], hours=8)
    # The second epoch is trained again, and its hours before the kill do not count.
    clock.now = 1e6
    _, rows = fit(tmp_path / "killed", 9, [clock.wait()], hours=8)
    assert [row["iterations"] for row in rows] == [3, 6, 8]
    assert [row["seconds"] for row in rows] == [3 * 3600, 3 * 3600, 2 * 3600]
    assert curve(rows) == curve(whole)


def test_a_folder_of_another_run_is_refused(fit, tmp_path):
    fit(tmp_path, 1, units=4, name="a")
    fit(tmp_path, 1, units=4, name="a")
    with pytest.raises(SystemExit, match=r"units=4, now 5.*--output-dir"):
        fit(tmp_path, 1, units=5, name="a")
    with pytest.raises(SystemExit, match="name='a', now None"):
        fit(tmp_path, 1, units=4)


def test_fewer_epochs_than_there_are_are_refused(fit, tmp_path):
    fit(tmp_path, 2)
    with pytest.raises(SystemExit, match=r"run of 2 epochs.* Received: --epochs 1"):
        fit(tmp_path, 1)
    assert len(fit(tmp_path, 2)[1]) == 2


@pytest.mark.slow
def test_a_killed_program_goes_on(run_log, paper, tmp_path, rng):
    """A program is killed by SIGKILL within an epoch, and is started again."""
    language_model = paper("language_model")
    data = tmp_path / "ptb"
    data.mkdir()
    words = [f"w{i}" for i in range(20)]
    for part, sentences in (("train", 400), ("valid", 80), ("test", 40)):
        lines = [" ".join(rng.choice(words, 8)) + "\n" for _ in range(sentences)]
        (data / f"ptb.{part}.txt").write_text("".join(lines))

    arguments = [
        *("--smoke", "--size", "small", "--dropout", "0.5", "--normalize", "input"),
        *("--epochs", "4", "--timesteps", "5", "--no-export"),
        *("--data-dir", str(data), "--output-dir"),
    ]
    killed = subprocess.Popen(
        [
            *(sys.executable, PAPER / "language_model.py"),
            *(*arguments, tmp_path / "killed"),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "killed" / "input" / "log.jsonl"
    until = time.monotonic() + 200
    while not log.exists() or log.read_text().count("\n") < 2:
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(run_log.read_log(log)) < 4
    for run in ("killed", "whole"):
        assert language_model.main([*arguments, str(tmp_path / run)]) == 0
    rows = run_log.read_log(tmp_path / "whole" / "input" / "log.jsonl")
    assert len(rows) == 4
    assert curve(run_log.read_log(log)) == curve(rows)
    results = [
        json.loads((tmp_path / run / "results.json").read_text())
        for run in ("killed", "whole")
    ]
    assert results[0] == results[1]
