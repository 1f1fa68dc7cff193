"""Measures the layers against their peers, and writes RESULTS.md and its charts.

Every ratio is of medians of one run, in which the contenders took turns. `fit` times
whole models as a user trains them. The other parts time single steps, of a graph and of
an XLA program; their targets take the faster of the two on each side.

    python benchmarks/run.py                 # all parts, about half an hour
    python benchmarks/run.py --only training inference
    python benchmarks/run.py --gpu           # on a GPU, cuDNN and XLA
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def geometric_mean(values):
    return math.exp(statistics.fmean(math.log(v) for v in values))


# Parts. Each returns a JSON-able dict.


def measure_steps(build, shapes, names, seconds, torch_python=None, kind="lstm"):
    """Times of each contender, by shape, name and mode: [median, low, high]."""
    import contenders
    import timing

    results = []
    for shape in shapes:
        functions, torch = {}, None
        for name in names:
            for mode in contenders.MODES:
                model = contenders.model(name, shape, kind, mode)
                x = contenders.frames(shape)
                functions[f"{name}/{mode}"] = build(model, x, mode)
        if torch_python:
            torch = contenders.TorchLSTM(shape, torch_python)
            functions["torch/eager"] = torch
        times = timing.alternate(functions, seconds)
        if torch is not None:
            torch.close()
        results.append({"shape": shape, "times": times})
        print(kind, shape, brief(times), flush=True)
    return results


def brief(times):
    return ", ".join(f"{k} {t[0] * 1e3:.1f}" for k, t in times.items())


def python_with_torch(arguments):
    """The interpreter that has torch, or `None`."""
    if arguments.torch_python:
        return arguments.torch_python
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    print("No torch here: give --torch-python to measure torch.nn.LSTM too.")
    return None


def training(arguments):
    import contenders

    torch_python = python_with_torch(arguments)
    names = ["bn", "bn off", "bn frame", "keras", "keras bn"]
    result = {
        "lstm": measure_steps(
            contenders.training_step,
            contenders.SHAPES,
            names,
            arguments.seconds,
            torch_python=torch_python,
        )
    }
    for kind in ("gru", "simple_rnn"):
        result[kind] = measure_steps(
            contenders.training_step,
            contenders.SHAPES,
            ["bn", "keras"],
            arguments.seconds / 2,
            kind=kind,
        )
    return result


def fit(arguments):
    """Steps of whole models under `fit`, as a user trains them."""
    import contenders
    import keras
    import timing

    results = {}
    for kind in contenders.FIT_MODELS:
        results[kind] = []
        for shape in contenders.FIT_SIZES:
            keras.backend.clear_session()
            functions = {
                f"{name}/{mode}": contenders.fitted(name, shape, kind, jit_compile)
                for name in ("bn", "keras")
                for mode, jit_compile in contenders.FIT_MODES.items()
            }
            times = timing.alternate(functions, arguments.seconds / 3, least=5)
            results[kind].append({"shape": shape, "times": times})
            print("fit", kind, shape, brief(times), flush=True)
    return results


def models(arguments):
    """Steps of the whole models of `contenders.WHOLE` under `fit`."""
    import contenders
    import keras
    import timing

    results = []
    for name in contenders.WHOLE:
        times = {}
        for mode, jit_compile in contenders.FIT_MODES.items():
            keras.backend.clear_session()
            functions = {
                f"{side}/{mode}": contenders.fitted_whole(side, name, jit_compile)
                for side in ("bn", "keras")
            }
            times |= timing.alternate(functions, arguments.seconds / 3, least=4)
        results.append({"model": name, "times": times})
        print("models", name, brief(times), flush=True)
    return results


def grid(arguments):
    """Steps by batch size and units: training in a graph and by XLA, inference."""
    import contenders
    import keras
    import timing

    results = {}
    for part, kind, modes in (
        ("training", "lstm", contenders.MODES),
        ("training", "gru", contenders.MODES),
        ("inference", "lstm", ("graph",)),
        ("inference", "gru", ("graph",)),
    ):
        build = getattr(contenders, f"{part}_step")
        found = results.setdefault(part, {})[kind] = []
        for shape in contenders.GRID:
            keras.backend.clear_session()
            x = contenders.frames(shape)
            functions = {
                f"{name}/{mode}": build(
                    contenders.model(name, shape, kind, mode), x, mode
                )
                for mode in modes
                for name in ("bn", "keras")
            }
            times = timing.alternate(functions, arguments.seconds / 10, least=5)
            found.append({"shape": shape, "times": times})
            print("grid", part, kind, shape, brief(times), flush=True)
    return results


def grid_of_torch(arguments):
    """Training steps of the LSTM against `torch.nn.LSTM`, by batch size and units."""
    import contenders
    import keras

    python = python_with_torch(arguments)
    results = []
    for shape in contenders.GRID if python else []:
        keras.backend.clear_session()
        results += measure_steps(
            contenders.training_step, [shape], ["bn"], arguments.seconds / 10, python
        )
    return {"lstm": results}


def varying(arguments):
    """Epochs of `fit` whose length changes with every batch, and whose does not."""
    import contenders
    import timing

    functions = {
        f"{name} {kind}/{'varying' if changes else 'fixed'}": contenders.varying(
            name, kind, changes
        )
        for kind in ("lstm", "gru")
        for name in ("bn", "keras")
        for changes in (True, False)
    }
    times = timing.alternate(functions, arguments.seconds * 2)
    print("varying", brief(times), flush=True)
    return times


def predict(arguments):
    """`predict` of one layer, with a batch size that the model does not know."""
    import contenders
    import keras
    import timing

    results = {}
    for kind in ("lstm", "gru"):
        results[kind] = []
        for shape in contenders.GRID:
            keras.backend.clear_session()
            functions = {
                f"{name}/default": contenders.predicted(name, shape, kind)
                for name in ("bn", "keras")
            }
            times = timing.alternate(functions, arguments.seconds / 10, least=5)
            results[kind].append({"shape": shape, "times": times})
            print("predict", kind, shape, brief(times), flush=True)
    return results


def inference(arguments):
    import contenders

    return {
        kind: measure_steps(
            contenders.inference_step,
            contenders.SHAPES,
            ["bn", "keras"],
            arguments.seconds / 2,
            kind=kind,
        )
        for kind in contenders.KINDS
    }


def stack(arguments):
    import contenders
    import timing

    shape = (24, 300, 123, 250)
    functions = {}
    for name in ("bn", "keras"):
        for mode in contenders.MODES:
            functions[f"{name}/{mode}"] = contenders.training_step(
                contenders.stack(name, shape), contenders.frames(shape), mode
            )
    times = timing.alternate(functions, arguments.seconds * 4, least=4)
    print("stack", brief(times), flush=True)
    return {"lstm": [{"shape": shape, "times": times}]}


def workers(measure, shapes, names, repeats, modes, kind="lstm"):
    """Results of `worker.py`, each in a fresh process, in turn."""
    results = []
    for shape in shapes:
        found = {f"{name}/{mode}": [] for name in names for mode in modes}
        for _ in range(repeats):
            for key, values in found.items():
                name, mode = key.split("/")
                output = subprocess.run(
                    [
                        sys.executable,
                        HERE / "worker.py",
                        measure,
                        name,
                        mode,
                        *map(str, shape),
                        "--kind",
                        kind,
                    ],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout
                values.append(json.loads(output.splitlines()[-1]))
        medians = {
            key: {f: statistics.median(v[f] for v in values) for f in values[0]}
            for key, values in found.items()
        }
        results.append({"shape": shape, "found": medians})
        print(measure, shape, medians, flush=True)
    return results


def memory(arguments):
    import contenders

    names, modes = ["bn", "keras"], contenders.MODES
    return {
        "lstm": workers("memory", contenders.SHAPES, names, 1, modes),
        "large batch": workers("memory", MEMORY_SHAPES, names, 3, ["graph"]),
    }


MEMORY_SHAPES = [(256, 100, 64, 64), (256, 1000, 64, 64)]
FIRST_FIT_SHAPES = [(16, 100, 64, 64), (256, 100, 64, 64)]


def compiling(arguments):
    import contenders

    shapes = [(8, 10, 64, 64), (8, 100, 64, 64), (8, 1000, 64, 64)]
    names = ["bn", "keras"]
    return {
        "lstm": workers("compile", shapes, names, 3, contenders.MODES),
        "first fit": {
            kind: workers("first fit", FIRST_FIT_SHAPES, names, 3, ["graph"], kind)
            for kind in ("lstm", "gru")
        },
    }


def linear(arguments):
    """Training steps over growing T and growing B."""
    import contenders

    units = 64
    by_length = [(8, t, units, units) for t in (10, 30, 100, 300, 1000, 3000, 10000)]
    by_batch = [(b, 100, units, units) for b in (1, 4, 16, 64, 256)]
    return {
        axis: measure_steps(
            contenders.training_step, shapes, ["bn", "keras"], arguments.seconds / 3
        )
        for axis, shapes in (("T", by_length), ("B", by_batch))
    }


def gpu(arguments):
    """Training and inference on a GPU: graphs with cuDNN, XLA without."""
    import contenders

    from keras_bnrnn.backend import has_fused_kernels

    if not has_fused_kernels():
        raise SystemExit("--gpu: TensorFlow sees no GPU here.")
    shapes = [*contenders.SHAPES, (64, 200, 512, 512)]
    names = ["bn", "bn off", "keras"]
    return {
        part: measure_steps(build, shapes, names, arguments.seconds)
        for part, build in (
            ("training", contenders.training_step),
            ("inference", contenders.inference_step),
        )
    }


PARTS = {
    "models": models,
    "grid": grid,
    "torch": grid_of_torch,
    "varying": varying,
    "predict": predict,
    "fit": fit,
    "training": training,
    "inference": inference,
    "stack": stack,
    "memory": memory,
    "compiling": compiling,
    "linear": linear,
}


# Results


def best(times, name):
    """Of the modes of a contender, the one with the least median."""
    return min((t for k, t in times.items() if k.split("/")[0] == name), default=None)


def ratios(results, ours, theirs):
    """Ratio of the best medians for each shape where both were measured."""
    found = []
    for result in results:
        a, b = best(result["times"], ours), best(result["times"], theirs)
        if a is not None and b is not None:
            found.append(a[0] / b[0])
    return found


def of_mode(results, mode):
    """The results of one mode alone."""
    return [
        {**r, "times": {k: t for k, t in r["times"].items() if k.endswith(mode)}}
        for r in results
    ]


def of_workers(results, field, ours, theirs, pick=min):
    """Ratio of the better mode of each side, for each shape."""

    def value(found, name):
        return pick(v[field] for k, v in found.items() if k.split("/")[0] == name)

    return [value(r["found"], ours) / value(r["found"], theirs) for r in results]


def targets(data):
    """Rows of (what, target, ratios, held)."""
    rows = []

    def add(what, found, mean=None, each=None):
        if not found:
            return
        bounds, held = [], True
        if mean is not None:
            bounds.append(f"geometric mean <= {mean:.2f}")
            held &= geometric_mean(found) <= mean
        if each is not None:
            bounds.append(f"each <= {each:.2f}")
            held &= max(found) <= each
        rows.append((what, ", ".join(bounds), found, held))

    if "models" in data:
        for mode, title, each in (
            ("default", "`fit` of whole models / stock", 1.0),
            (
                "jit_compile=True",
                "The same with `jit_compile=True` on both sides",
                1.05,
            ),
        ):
            add(title, fit_ratios(data["models"], mode), 0.80, each)
    if "grid" in data:
        steps = [r for of in data["grid"]["training"].values() for r in of]
        add(
            "Grid, training in a graph / keras",
            ratios(of_mode(steps, "graph"), "bn", "keras"),
            0.80,
            1.0,
        )
        add("Grid, training / keras", ratios(steps, "bn", "keras"), 0.75, 0.95)
        steps = [r for of in data["grid"]["inference"].values() for r in of]
        add(
            "Grid, inference in a graph / keras",
            ratios(steps, "bn", "keras"),
            0.85,
            1.0,
        )
    if "torch" in data:
        add(
            "Grid, training / torch.nn.LSTM",
            ratios(data["torch"]["lstm"], "bn", "torch"),
            1.2,
        )
    if "varying" in data:
        times = data["varying"]
        add(
            "`fit`, T changes with every batch / a fixed T: LSTM, GRU",
            [
                times[f"bn {kind}/varying"][0] / times[f"bn {kind}/fixed"][0]
                for kind in ("lstm", "gru")
            ],
            each=1.1,
        )
    if "predict" in data:
        steps = [r for of in data["predict"].values() for r in of]
        add(
            "Grid, `predict`, any batch size / keras",
            ratios(steps, "bn", "keras"),
            0.85,
            1.0,
        )
    if "training" in data:
        lstm = data["training"]["lstm"]
        add(
            "BNLSTM / keras LSTM, training",
            ratios(lstm, "bn", "keras"),
            0.60,
            0.90,
        )
        add(
            "BNLSTM / keras BatchNormalization + LSTM, training",
            ratios(lstm, "bn", "keras bn"),
            0.45,
        )
        add(
            "BNLSTM frame-wise / keras LSTM, training",
            ratios(lstm, "bn frame", "keras"),
            0.75,
            1.0,
        )
        both = ratios(data["training"]["gru"], "bn", "keras")
        both += ratios(data["training"]["simple_rnn"], "bn", "keras")
        add("BNGRU / keras GRU; BNSimpleRNN / keras SimpleRNN", both, 0.80, 1.0)
        add(
            "BNLSTM / the same without normalisation",
            ratios(lstm, "bn", "bn off"),
            each=1.08,
        )
        add("BNLSTM / torch.nn.LSTM, training", ratios(lstm, "bn", "torch"), 1.25)
    if "inference" in data:
        add(
            "BNLSTM / keras LSTM, inference",
            ratios(data["inference"]["lstm"], "bn", "keras"),
            0.85,
            1.0,
        )
        both = ratios(data["inference"]["gru"], "bn", "keras")
        both += ratios(data["inference"]["simple_rnn"], "bn", "keras")
        add("The same for GRU; SimpleRNN", both, 0.85, 1.0)
    if "memory" in data:
        add(
            "BNLSTM / keras LSTM, peak memory of a process that trains",
            of_workers(data["memory"]["lstm"], "process_bytes", "bn", "keras"),
            each=1.1,
        )
        if "large batch" in data["memory"]:
            add(
                "The same in a graph, batch 256, 64 units, T 100 and 1,000",
                of_workers(
                    data["memory"]["large batch"], "process_bytes", "bn", "keras"
                ),
                each=1.0,
            )
    if "compiling" in data:
        found = data["compiling"]["lstm"]
        of_xla = [
            {"found": {k: v for k, v in r["found"].items() if k.endswith("xla")}}
            for r in found
        ]
        add(
            "BNLSTM / keras LSTM, trace and XLA compilation",
            of_workers(of_xla, "seconds", "bn", "keras"),
            each=1.3,
        )
        own = [r["found"]["bn/xla"]["seconds"] for r in found]
        add("The same of BNLSTM, longest T / shortest", [own[-1] / own[0]], each=1.15)
    if "gpu" in data:
        steps = data["gpu"]["training"]
        add(
            "GPU: BNLSTM / keras LSTM on the fused kernel, training",
            ratios(of_mode(steps, "graph"), "bn", "keras"),
            each=1.15,
        )
        add(
            "GPU: BNLSTM / keras LSTM under XLA, training",
            ratios(of_mode(steps, "xla"), "bn", "keras"),
            each=1.0,
        )
    if "stack" in data:
        add(
            "Bidirectional 5 x 250 / the Keras one, training",
            ratios(data["stack"]["lstm"], "bn", "keras"),
            each=0.80,
        )
    return rows


def table(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def milliseconds(timing):
    median, low, high = (1e3 * t for t in timing)
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def times_table(results):
    names = list(results[0]["times"])
    rows = [["B, T, D, U", *(n.replace("/", ", ") for n in names)]]
    for result in results:
        times = result["times"]
        cells = [milliseconds(times[n]) if n in times else "" for n in names]
        rows.append([", ".join(map(str, result["shape"])), *cells])
    return table(rows)


def machines(data):
    """A sentence for each machine on which parts were measured."""
    parts = {}
    for part, about in data.get("machines", {}).items():
        text = f"{about['machine']}. {about['versions']}. {about['date']}."
        parts.setdefault(text, []).append(part)
    if len(parts) == 1:
        return "Machine: " + next(iter(parts))
    return " ".join(f"Machine of {', '.join(of)}: {text}" for text, of in parts.items())


def report(data):
    """RESULTS.md of what was measured."""
    lines = [
        "# Results",
        "",
        f"Made by `make bench`. {machines(data)} Ratios are of "
        "medians of one run in which the contenders took turns; times are "
        "milliseconds, with the middle half of the measurements in brackets. The "
        "machine is shared: times move by some 20 % from run to run, ratios by less.",
        "",
        *models_section(data),
        *grid_section(data),
        *fit_section(data),
        "## Single steps",
        "",
        "A training step is the forward pass, the mean of the squared outputs, the "
        "gradients of all weights and a step of gradient descent. *without "
        "normalisation*, `bn off`, is the same layer with `input_norm` frozen: the "
        "same loop, no batch statistics. Frame-wise training of a single row is "
        "measured with the batch size unknown to the layer, which refuses it "
        "otherwise.",
        "",
        "![Training steps](steps.png)",
        "",
        "## Targets",
        "",
        "The ratios take the faster of graph and XLA on each side.",
        "",
    ]
    rows = [["what", "target", "geometric mean", "each", ""]]
    for what, target, found, held in targets(data):
        each = ", ".join(f"{r:.2f}" for r in found)
        mean = f"{geometric_mean(found):.2f}"
        rows.append([what, target, mean, each, "held" if held else "**missed**"])
    lines += [table(rows), ""]
    notes = HERE / "NOTES.md"
    if notes.exists():
        lines += [notes.read_text().strip(), ""]
    for part, title in (
        ("training", "Training"),
        ("inference", "Inference"),
        ("stack", "Bidirectional stack, training"),
    ):
        for kind, results in data.get(part, {}).items():
            lines += [f"## {title}: {kind}", "", times_table(results), ""]
    if "memory" in data:
        names = list(data["memory"]["lstm"][0]["found"])
        rows = [["B, T, D, U", *names]]
        for result in [r for of in data["memory"].values() for r in of]:
            cells = [", ".join(map(str, result["shape"]))]
            for name in names:
                found = result["found"].get(name, {})
                mib = [found[f] / 2**20 for f in ("process_bytes", "bytes") if found]
                cells.append("{:.0f} ({:.0f})".format(*mib) if mib else "")
            rows.append(cells)
        lines += [
            "## Memory",
            "",
            "MiB that a process of its own holds at the peak of tracing, compiling and "
            "five training steps; in brackets, less what it held before the model was "
            "made.",
            "",
            table(rows),
            "",
        ]
    if "compiling" in data:
        rows = [["B, T, D, U", *data["compiling"]["lstm"][0]["found"]]]
        for result in data["compiling"]["lstm"]:
            rows.append(
                [
                    ", ".join(map(str, result["shape"])),
                    *(f"{v['seconds']:.2f}" for v in result["found"].values()),
                ]
            )
        lines += [
            "## Compilation",
            "",
            "Seconds of the first training step less those of the second: tracing, "
            "and under XLA compiling. Each in a process of its own, medians of 3.",
            "",
            table(rows),
            "",
        ]
        rows = [["layer", "B, T, D, U", "bn", "keras"]]
        for kind, results in data["compiling"].get("first fit", {}).items():
            for result in results:
                rows.append(
                    [
                        kind,
                        ", ".join(map(str, result["shape"])),
                        *(f"{v['seconds']:.2f}" for v in result["found"].values()),
                    ]
                )
        if len(rows) > 1:
            lines += [
                "The same of the first `fit` of 16 full batches of a recurrent layer "
                "and a `Dense` one, in a graph.",
                "",
                table(rows),
                "",
            ]
    if "gpu" in data:
        about = data["gpu"]["about"]
        lines += [f"## GPU: {about['machine']}", "", f"{about['versions']}.", ""]
        for part in ("training", "inference"):
            lines += [f"### {part}", "", times_table(data["gpu"][part]), ""]
    if "linear" in data:
        lines += ["## Growth with T and B", "", "![Growth](growth.png)", ""]
        for results in data["linear"].values():
            lines += [times_table(results), ""]
    return "\n".join(lines)


FIT_TITLES = {
    "lstm": "one LSTM",
    "gru": "one GRU",
    "masked lstm": "two LSTMs, masked",
}


def fit_ratios(results, mode, ours_mode=None):
    """Ours over Keras', for each shape, both under one mode."""
    return [
        r["times"][f"bn/{ours_mode or mode}"][0] / r["times"][f"keras/{mode}"][0]
        for r in results
    ]


def models_section(data):
    """The table of whole models."""
    if "models" not in data:
        return []
    rows = [["model", "default, ms", "ratio", "`jit_compile=True`, ms", "ratio"]]
    for result in data["models"]:
        cells = [result["model"]]
        for mode in ("default", "jit_compile=True"):
            own, stock = (result["times"][f"{n}/{mode}"][0] for n in ("bn", "keras"))
            cells += [f"{own * 1e3:.0f} / {stock * 1e3:.0f}", f"{own / stock:.2f}"]
        rows.append(cells)
    return [
        "## Whole models under `fit`",
        "",
        "The time of a step of `model.fit` with our layers / with the stock ones. "
        "Sequences have 100 timesteps, those of the language model 35; masked ones are "
        "padded to them from 50 to 100. The language model is frame-wise.",
        "",
        table(rows),
        "",
    ]


def grid_section(data):
    """The tables of steps by batch size and units."""
    if "grid" not in data:
        return []
    lines = [
        "## Steps by batch size and units",
        "",
        "Our step over Keras' step, T 100, D = U, `return_sequences`, no mask. "
        "*best* takes the faster of graph and XLA on each side.",
        "",
        "![Training steps by batch size](training.png)",
        "",
    ]
    batches = sorted({r["shape"][0] for r in data["grid"]["training"]["lstm"]})
    rows = [["what", "U", *(f"B = {b}" for b in batches)]]
    for part, kinds in data["grid"].items():
        for kind, results in kinds.items():
            for units in sorted({r["shape"][-1] for r in results}):
                some = [r for r in results if r["shape"][-1] == units]
                modes = [("graph", of_mode(some, "graph"))]
                if part == "training":
                    modes += [("XLA", of_mode(some, "xla")), ("best", some)]
                for mode, chosen in modes:
                    found = ratios(chosen, "bn", "keras")
                    rows.append(
                        [
                            f"{part}, {kind}, {mode}",
                            units,
                            *(f"{r:.2f}" for r in found),
                        ]
                    )
    for part, title, peer in (
        ("predict", "`predict`, any batch size", "keras"),
        ("torch", "training / torch.nn.LSTM, best", "torch"),
    ):
        for kind, results in data.get(part, {}).items():
            for units in sorted({r["shape"][-1] for r in results}):
                some = [r for r in results if r["shape"][-1] == units]
                found = ratios(some, "bn", peer)
                rows.append([f"{title}, {kind}", units, *(f"{r:.2f}" for r in found)])
    return [*lines, table(rows), ""]


def fit_section(data):
    """The table of what a user of `fit` sees."""
    if "fit" not in data:
        return []
    sizes = [r["shape"] for r in next(iter(data["fit"].values()))]
    _, timesteps, width, units = sizes[0]
    rows = [["model", "compiled with", *(f"B = {shape[0]}" for shape in sizes)]]
    for kind, results in data["fit"].items():
        for mode, title in (
            ("default", "nothing (the default)"),
            ("jit_compile=True", "`jit_compile=True`"),
        ):
            found = fit_ratios(results, mode)
            rows.append([FIT_TITLES[kind], title, *(f"{r:.2f}" for r in found)])
        found = fit_ratios(results, "default", "jit_compile=True")
        title = "ours `jit_compile=True`, Keras' nothing"
        rows.append([FIT_TITLES[kind], title, *(f"{r:.2f}" for r in found)])
    lines = [
        "## `fit` of whole models",
        "",
        "The time of a step of `model.fit` with our layers over that with the stock "
        f"Keras layers: T {timesteps}, D {width}, U {units}, a `Dense` layer on top, "
        "Adam. Below 1, ours is faster. Keras compiles with XLA by default only where "
        "it sees a GPU: on this machine the default is a plain TensorFlow graph.",
        "",
        table(rows),
        "",
    ]
    for kind, results in data["fit"].items():
        lines += [f"Milliseconds a step, {FIT_TITLES[kind]}:", ""]
        lines += [times_table(results), ""]
    return lines


def grid_chart(data, directory, plt):
    training = data["grid"]["training"]
    figure, axes = plt.subplots(1, len(training), figsize=(10, 3.8), sharey=True)
    for axis, (kind, results) in zip(axes, training.items(), strict=True):
        for color, units in zip(
            ("C0", "C1", "C2"), sorted({r["shape"][-1] for r in results}), strict=True
        ):
            some = [r for r in results if r["shape"][-1] == units]
            for mode, line in (("graph", "o-"), ("xla", "s--")):
                axis.plot(
                    range(len(some)),
                    ratios(of_mode(some, mode), "bn", "keras"),
                    line,
                    color=color,
                    label=f"{units} units, {'XLA' if mode == 'xla' else mode}",
                )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(some)), [r["shape"][0] for r in some])
        axis.set_xlabel("batch size")
        axis.set_title(f"BN{kind.upper()}", fontsize=10)
    axes[0].set_ylim(bottom=0.0)  # of all axes, now that all lines are drawn
    axes[0].set_ylabel("training step, stock Keras layer = 1")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.86))
    figure.savefig(directory / "training.png", dpi=120)
    plt.close(figure)


def charts(data, directory):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "grid" in data:
        grid_chart(data, directory, plt)
    if "training" in data:
        figure, axis = plt.subplots(figsize=(9, 4.4))
        names = [
            ("bn", "BNLSTM"),
            ("bn frame", "BNLSTM, frame-wise"),
            ("bn off", "the same without normalisation"),
            ("keras", "keras LSTM"),
            ("keras bn", "keras BatchNormalization + LSTM"),
            ("torch", "torch.nn.LSTM"),
        ]
        results = data["training"]["lstm"]
        names = [n for n in names if best(results[0]["times"], n[0]) is not None]
        for i, (name, label) in enumerate(names):
            heights = [
                best(r["times"], name)[0] / best(r["times"], "keras")[0]
                for r in results
            ]
            where = [x + (i - (len(names) - 1) / 2) * 0.13 for x in range(len(results))]
            axis.bar(where, heights, 0.13, label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(
            range(len(results)),
            ["B {}, T {}, D {}, U {}".format(*r["shape"]) for r in results],
        )
        axis.set_ylabel("single step, the faster of graph and XLA;\nkeras LSTM = 1")
        figure.legend(loc="upper center", ncols=3, fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.9))
        figure.savefig(directory / "steps.png", dpi=120)
        plt.close(figure)
    if "linear" in data:
        figure, axes = plt.subplots(1, 2, figsize=(9, 4))
        for axis, (name, results) in zip(axes, data["linear"].items(), strict=True):
            index = 1 if name == "T" else 0
            sizes = [r["shape"][index] for r in results]
            for contender, label in (("bn", "BNLSTM"), ("keras", "keras LSTM")):
                times = [1e3 * best(r["times"], contender)[0] for r in results]
                axis.loglog(sizes, times, "o-", label=label)
                if contender == "bn":
                    line = [times[-1] * s / sizes[-1] for s in sizes]
                    axis.loglog(sizes, line, "k:", label="proportional")
            shape = results[0]["shape"]
            rest = f"B {shape[0]}" if name == "T" else f"T {shape[1]}"
            axis.set_xlabel(f"{name} ({rest}, D {shape[2]}, U {shape[3]})")
            axis.set_ylabel("training step, ms")
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(directory / "growth.png", dpi=120)
        plt.close(figure)


def about():
    import keras
    import tensorflow as tf

    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    versions = [
        f"Python {platform.python_version()}",
        f"TensorFlow {tf.__version__}",
        f"Keras {keras.__version__}",
    ]
    if importlib.util.find_spec("torch") is not None:
        from importlib.metadata import version

        versions.append(f"torch {version('torch')}")
    gpus = [
        tf.config.experimental.get_device_details(device).get("device_name", "GPU")
        for device in tf.config.list_physical_devices("GPU")
    ]
    return {
        "machine": f"{os.cpu_count()} cores of {name}, {', '.join(gpus) or 'no GPU'}",
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="per shape (default: %(default)s)"
    )
    parser.add_argument(
        "--torch-python",
        help="a Python interpreter with torch, to measure torch.nn.LSTM too (default: "
        "this one, if it has torch)",
    )
    parser.add_argument(
        "--output-dir",
        type=pathlib.Path,
        default=HERE,
        help="where results.json, RESULTS.md and the charts go (default: here)",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="measure on a GPU instead; the results stand beside those of the CPU",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: write the page from results.json again",
    )
    arguments = parser.parse_args()
    directory = arguments.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    if arguments.gpu:
        data["gpu"] = {**gpu(arguments), "about": about()}
        path.write_text(json.dumps(data, indent=1) + "\n")
    elif not arguments.report:
        for part in arguments.only:
            data[part] = PARTS[part](arguments)
            data.setdefault("machines", {})[part] = about()
            path.write_text(json.dumps(data, indent=1) + "\n")
    (directory / "RESULTS.md").write_text(report(data))
    charts(data, directory)
    for what, target, found, held in targets(data):
        each = ", ".join(f"{r:.2f}" for r in found)
        print(
            f"{'held  ' if held else 'MISSED'} {what}: {target}; "
            f"{geometric_mean(found):.2f} of {each}"
        )


if __name__ == "__main__":
    main()
