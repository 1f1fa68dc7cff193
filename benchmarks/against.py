"""Times the working tree against an earlier commit, in turn, in one run.

    python benchmarks/against.py COMMIT [--only train masked infer serve] [--turns 15]

Two processes hold one version each and are asked one after the other: what slows the
machine down for a while slows both down. Prints seconds and the ratio new / old of the
medians for each case, and the geometric mean of the ratios of each part.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAST = 0.1  # seconds that a turn takes
PARTS = ("train", "masked", "infer", "serve")


def cases(part):
    """List of `(part, kind, mode, shape)`, with shape (B, T, D, U)."""
    import contenders

    shapes = list(contenders.SHAPES)
    kinds = ("lstm", "gru")
    if part == "serve":
        shapes = [(1, 50, 64, 128), (32, 50, 64, 128)]
        modes = ("serve", "step")
    else:
        modes = contenders.MODES
    return [(part, k, m, s) for k in kinds for m in modes for s in shapes]


class Version:
    """A process that runs cases with one version of the package."""

    def __init__(self, directory):
        environment = {**os.environ, "PYTHONPATH": str(directory)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("A process ended; its error is above.")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def worker():
    import time

    import keras_bnrnn

    run, repeats = None, 1
    for line in sys.stdin:
        message = json.loads(line)
        if message == "which":
            answer = str(pathlib.Path(keras_bnrnn.__file__).parent.parent)
        elif message == "run":
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            answer = (time.perf_counter() - start) / repeats
        else:
            run = prepared(*message)
            run()
            start = time.perf_counter()
            run()
            # Short steps are repeated: a process that waited has cold caches.
            repeats = max(1, round(LEAST / (time.perf_counter() - start)))
            answer = None
        print("answer", json.dumps(answer), flush=True)


def prepared(part, kind, mode, shape):
    """A function of a case that returns when its work is done."""
    import contenders

    shape = tuple(shape)
    x = contenders.frames(shape)
    if part == "serve":
        return exported(contenders.model("bn", (None, None, *shape[2:]), kind), x, mode)
    if part == "masked":
        return masked_step(contenders.layer("bn", shape, kind, mode), x, mode)
    model = contenders.model("bn", shape, kind, mode)
    if part == "train":
        return contenders.training_step(model, x, mode)
    return contenders.inference_step(model, x, mode)


def masked_step(layer, x, mode):
    """A training step with right padding, lengths uniform in T/2..T."""
    import numpy as np
    import tensorflow as tf

    batch, timesteps, _ = x.shape
    lengths = np.random.default_rng(1).integers(timesteps // 2, timesteps + 1, batch)
    mask = tf.constant(np.arange(timesteps) < lengths[:, None])
    x = tf.constant(x)
    layer.build(x.shape)

    @tf.function(jit_compile=mode == "xla", autograph=False)
    def step(x, mask):
        weights = [w.value for w in layer.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = layer(x, mask=mask, training=True)
            outputs = tf.where(mask[..., None], outputs, 0.0)
            loss = tf.reduce_mean(tf.square(outputs))
        for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
            weight.assign_sub(0.01 * gradient)
        return loss

    return lambda: step(x, mask).numpy()


def exported(model, x, signature):
    import numpy as np
    import tensorflow as tf

    from keras_bnrnn import export_saved_model

    directory = tempfile.mkdtemp()
    export_saved_model(model, directory)
    (version,) = pathlib.Path(directory).iterdir()
    loaded = tf.saved_model.load(str(version))
    if signature == "step":
        signature = next(s for s in loaded.signatures if s.startswith("step"))
    function = loaded.signatures[signature]
    inputs = {}
    lengths = np.random.default_rng(1).integers(x.shape[1] // 2, x.shape[1], len(x))
    for name, spec in function.structured_input_signature[1].items():
        if name == "lengths":
            inputs[name] = tf.constant(lengths, spec.dtype)
        elif spec.shape.rank == 3:
            inputs[name] = tf.constant(x)
        elif spec.shape.rank == 2 and spec.shape[1] == x.shape[2]:
            inputs[name] = tf.constant(x[:, 0])
        else:
            inputs[name] = tf.zeros([len(x), *spec.shape[1:]], spec.dtype)
    return lambda: [y.numpy() for y in function(**inputs).values()]


def measure(new, old, turns):
    times = {new: [], old: []}
    for turn in range(turns):
        for version in (new, old) if turn % 2 else (old, new):
            times[version].append(version.ask("run"))
    return [statistics.median(times[version]) for version in (new, old)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", nargs="?", help="what to compare with")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kinds", nargs="+", default=["lstm", "gru"])
    parser.add_argument("--turns", type=int, default=15, help="turns of each case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    if not arguments.commit:
        parser.error("the commit to compare with is missing")

    with tempfile.TemporaryDirectory() as directory:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--quiet", "--detach", directory, arguments.commit],
            check=True,
        )
        new, old = Version(ROOT), Version(directory)
        try:
            print(f"new: {new.ask('which')}, old: {old.ask('which')}", flush=True)
            for part in arguments.only:
                ratios = []
                for case in cases(part):
                    if case[1] not in arguments.kinds:
                        continue
                    for version in (new, old):
                        version.ask(case)
                    seconds = measure(new, old, arguments.turns)
                    ratios.append(seconds[0] / seconds[1])
                    print(
                        f"{' '.join(map(str, case)):45}"
                        f"{seconds[0] * 1e3:9.2f} ms {seconds[1] * 1e3:9.2f} ms"
                        f"{ratios[-1]:7.3f}",
                        flush=True,
                    )
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                print(f"{part}: geometric mean {mean:.3f}, most {max(ratios):.3f}")
        finally:
            new.close()
            old.close()
            subprocess.run([*git, "remove", "--force", directory], check=True)


if __name__ == "__main__":
    main()
