"""The example of several workers: a crash, a restart, and the statistics at the end."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import types

import keras
import numpy as np
import pytest
from pages import free_port

import keras_bnrnn

pytest.importorskip("sklearn")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
OPTIONS = ["--units", "8", "--epochs", "4", "--learning-rate", "0.005"]
# The example. The worker whose number is in the file `crash` kills itself in the third
# epoch.
CRASHING = """
import json, os, pathlib, signal, sys
import multi_worker

def kill(self, batch, logs=None):
    task = json.loads(os.environ["TF_CONFIG"])["task"]
    crash = pathlib.Path("crash")
    if int(self.epoch) == 2 and batch == 5 and crash.exists():
        if crash.read_text() == str(task["index"]):
            crash.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

multi_worker.Checkpoints.on_train_batch_begin = kill
sys.exit(multi_worker.main())
"""


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("multi_worker")


def start(program, arguments, folder, **environment):
    """Starts a program that may import from the examples."""
    paths = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_workers(program, arguments, folder):
    """Runs two workers and returns the status, output and errors of each."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    cluster = {"cluster": {"worker": addresses}}
    tasks = [{"task": {"type": "worker", "index": index}} for index in range(2)]
    workers = [
        start(program, arguments, folder, TF_CONFIG=json.dumps({**cluster, **task}))
        for task in tasks
    ]
    try:
        texts = [worker.communicate(timeout=600) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(w.returncode, *text) for w, text in zip(workers, texts, strict=True)]


def statistics(path):
    """Returns the mean and variance of each norm of a saved model."""
    model = keras.saving.load_model(path, compile=False)
    norms = [layer.input_norm for layer in model.layers[1:3]]
    return [
        keras.ops.convert_to_numpy(value)
        for norm in norms
        for value in (norm.moving_mean, norm.moving_variance)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["chief", "worker"])
def test_a_killed_worker_is_restarted(victim, example, tmp_path):
    (tmp_path / "crashing.py").write_text(CRASHING)
    (tmp_path / "crash").write_text(str(victim))
    options = [*OPTIONS, "--output-dir", "two"]
    results = run_workers("crashing.py", options, tmp_path)
    (killed, _, _), (status, _, errors) = results[victim], results[1 - victim]
    assert killed == -9, errors[-3000:]
    if victim == 1:
        assert status == 1, errors[-3000:]
        assert "error: another worker has ended" in errors
    else:
        # The chief runs TensorFlow's coordination service. Without it TensorFlow may
        # abort the process.
        assert status != 0, errors[-3000:]
    assert not (tmp_path / "two" / "model.keras").exists()
    output = results[0][1]
    assert "epochs that are done: 0" in output and "Epoch 3/4" in output

    (status, output, errors), (other, quiet, _) = run_workers(
        "crashing.py", options, tmp_path
    )
    assert (status, other) == (0, 0), errors[-3000:]
    assert "2 replicas; epochs that are done: 2" in output and quiet == ""
    assert re.findall(r"^Epoch (\d)", output, re.M) == ["3", "4"]
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"checkpoints", "model.keras"}  # nothing of worker 1
    compare_with_one_process(example, tmp_path)


def compare_with_one_process(example, folder):
    """Checks the statistics of `two/model.keras`."""
    one = start(EXAMPLES / "multi_worker.py", [*OPTIONS, "--output-dir", "one"], folder)
    alone, errors = one.communicate(timeout=600)
    assert one.returncode == 0, errors[-3000:]
    assert "1 replicas" in alone

    statistics_of = {
        name: statistics(folder / name / "model.keras") for name in ("one", "two")
    }
    for two, one in zip(statistics_of["two"], statistics_of["one"], strict=True):
        # The workers add in another order than one process: float32, 76 updates.
        np.testing.assert_allclose(two, one, atol=1e-6)
        assert np.std(one) > 1e-2  # they are statistics of something

    # They are those of the training data: nothing of a moving average remains.
    model = keras.saving.load_model(folder / "two" / "model.keras", compile=False)
    before = statistics_of["two"]
    (x, _), _ = example.digits(1)
    keras_bnrnn.recalibrate(model, x, verbose=0)
    model.save(folder / "again.keras")
    for again, value in zip(statistics(folder / "again.keras"), before, strict=True):
        np.testing.assert_allclose(again, value, rtol=1e-6, atol=1e-7)


def test_the_order_depends_on_seed_and_epoch(example):
    x = np.arange(10, dtype="float32")
    options = types.SimpleNamespace(seed=3, epochs=4, batch_size=4)

    def rows(first):
        batches = example.shuffled_batches(x, x.astype("int32"), first, options)
        return [a.numpy().tolist() for a, b in batches if np.array_equal(a, b)]

    everything = rows(0)
    assert len(everything) == 4 * 2 and rows(2) == everything[4:]
    for epoch in range(4):
        first, second = everything[2 * epoch : 2 * epoch + 2]
        assert len({*first, *second}) == 8  # each row at most once
    assert len({tuple(batch) for batch in everything}) == 8
    options.seed = 4
    assert rows(0) != everything


# Worker 1 fails as often as the file `failures` has lines, when all three have started.
# The others wait for `done`.
STUB = """
import json, os, pathlib, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
with open(f"started{index}", "a") as file:
    print(json.dumps([sys.argv[1:], config]), file=file)
failures, done = pathlib.Path("failures"), pathlib.Path("done")

def starts(index):
    path = pathlib.Path(f"started{index}")
    return len(path.read_text().splitlines()) if path.exists() else 0

left = failures.read_text().splitlines()
if index != 1:
    while not done.exists():
        time.sleep(0.05)
elif left:
    while min(starts(0), starts(2)) < starts(1):
        time.sleep(0.05)
    failures.write_text("\\n".join(left[1:]))
    sys.exit(7)
done.touch()
"""


@pytest.mark.parametrize("failures", [0, 1, 9])
def test_local_workers(failures, example, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(textwrap.dedent(STUB))
    (tmp_path / "failures").write_text("\n".join("x" * failures))
    monkeypatch.setattr(sys, "argv", ["stub.py", "--local-workers", "3"])
    status = example.main()
    assert status == (1 if failures > example.RESTARTS else 0)
    printed = capfd.readouterr().out
    starts = min(failures, example.RESTARTS) + 1
    assert printed.count("Starting all workers again") == starts - 1
    assert printed.count("Worker 1 ended with status 7") == min(failures, starts)
    for index in range(3):
        lines = (tmp_path / f"started{index}").read_text().splitlines()
        assert len(lines) == starts
        arguments, config = json.loads(lines[-1])
        assert arguments[-2:] == ["--local-workers", "0"]  # the last one counts
        assert config["task"] == {"type": "worker", "index": index}
        assert len(set(config["cluster"]["worker"])) == 3
