"""Models that version 0.1.0 saved, and their answers.

    python tests/saved_answers.py FILE

writes such a file with the installed version. Version 0.1.0 wrote the file in
`tests/data`. Every later version must load its models and give its answers.
"""

import io
import json
import pathlib
import sys
import tarfile
import tempfile

import keras
import numpy as np
import tensorflow as tf

import keras_bnrnn

FILE = pathlib.Path(__file__).parent / "data" / "saved_0_1_0.tar.xz"
B, T, D, U = 4, 4, 3, 2
KINDS = {
    "simple_rnn": keras_bnrnn.BNSimpleRNN,
    "lstm": keras_bnrnn.BNLSTM,
    "gru": keras_bnrnn.BNGRU,
}
CELLS = {
    "simple_rnn": keras_bnrnn.BNSimpleRNNCell,
    "lstm": keras_bnrnn.BNLSTMCell,
    "gru": keras_bnrnn.BNGRUCell,
}
WHOLE = {"return_sequences": True, "return_state": True}
OPTIONS = {
    "input": WHOLE,
    "frame": {"statistics": "frame", "return_sequences": True},
    "joint": {"normalize": "joint", **WHOLE},
    "backwards": {"go_backwards": True, **WHOLE},
    "joint_backwards": {"normalize": "joint", "go_backwards": True},
    "last": {"zero_output_for_mask": True},
    "zero_output": {"zero_output_for_mask": True, **WHOLE},
    "no_bias": {"use_bias": False, "epsilon": 1e-2, "momentum": 0.5},
    "relu": {"activation": "relu", **WHOLE},
    "softmax": {"activation": "softmax", **WHOLE},
    "unroll": {"unroll": True, "return_sequences": True},
    "stateful": {"stateful": True, "recurrent_dropout": 0.2, "dropout": 0.1},
    "float32": {"dtype": "float32", **WHOLE},
    "regularized": {"bias_regularizer": "l2", "kernel_constraint": "max_norm"},
}
MORE = {
    "lstm_peephole": ("lstm", {"peephole": True, **WHOLE}),
    "lstm_peephole_joint": ("lstm", {"peephole": True, "normalize": "joint", **WHOLE}),
    "lstm_no_forget": ("lstm", {"unit_forget_bias": False, "return_sequences": True}),
    "gru_before": ("gru", {"reset_after": False, **WHOLE}),
    "gru_before_joint": ("gru", {"reset_after": False, "normalize": "joint", **WHOLE}),
    "gru_hard": ("gru", {"recurrent_activation": "hard_sigmoid", **WHOLE}),
}
NORMS = {
    "norm_sequence": {},
    "norm_frame": {"statistics": "frame"},
    "norm_bare": {"center": False, "scale": False, "epsilon": 1e-2},
}


def layers():
    """Dict from the name of each case to its layer."""
    made = {}
    for kind, layer in KINDS.items():
        for name, options in OPTIONS.items():
            made[f"{kind}_{name}"] = layer(U, **{"dtype": "float64", **options})
        # Keras masks what a cell in float64 gives with zeros in float32.
        made[f"{kind}_cell"] = keras.layers.RNN(CELLS[kind](U), **WHOLE)
        made[f"{kind}_both"] = keras.layers.Bidirectional(
            layer(U, return_sequences=True, dtype="float64"), dtype="float64"
        )
    for name, (kind, options) in MORE.items():
        made[name] = KINDS[kind](U, dtype="float64", **options)
    for name, options in NORMS.items():
        made[name] = keras_bnrnn.SequenceBatchNorm(dtype="float64", **options)
    cells = [cell(U) for cell in CELLS.values()]
    made["stacked"] = keras.layers.RNN(cells, return_sequences=True)
    return made


def masks(rng):
    """Masks (B, T) by name."""
    lengths = rng.permutation(np.arange(B) % (T + 1))
    right = np.arange(T) < lengths[:, None]
    gaps = rng.random((B, T)) < 0.6
    gaps[0], gaps[1] = False, True
    return {"none": None, "right": right, "left": right[:, ::-1], "gaps": gaps}


def answers(name, layer, x, mask_of):
    """Dict of arrays: all that a layer answers, the same whatever its version.

    Masks in training are right padding that is read forwards: there a timestep is the
    same however it is counted.
    """
    dtype = layer.compute_dtype
    found = {}
    is_cell = name.endswith("_cell") or name == "stacked"
    reads_backwards = "backwards" in name or name.endswith("_both")
    for mask_name, mask in mask_of.items():
        reset(layer)
        outputs = layer(tf.cast(x, dtype), mask=mask, training=False)
        for i, y in enumerate(keras.tree.flatten(outputs)):
            if name.startswith("norm") and mask is not None:
                y = np.asarray(y)[mask]
            found[f"inference/{mask_name}/{i}"] = y
    for mask_name in ("none", "right"):
        mask = mask_of[mask_name]
        if name.endswith("stateful") or (
            mask is not None and (reads_backwards or is_cell)
        ):
            continue  # random, or of a meaning of t that changed
        before = layer.get_weights()
        for key, value in trained(layer, tf.cast(x, dtype), mask).items():
            found[f"training/{mask_name}/{key}"] = value
        layer.set_weights(before)
    return {key: np.asarray(value, "float32") for key, value in found.items()}


def reset(layer):
    if getattr(layer, "stateful", False):
        layer.reset_state()


def trained(layer, x, mask):
    """Outputs, gradients and statistics of a training call."""
    weights = [w.value for w in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = keras.tree.flatten(layer(x, mask=mask, training=True))
        if isinstance(layer, keras_bnrnn.SequenceBatchNorm) and mask is not None:
            outputs = [tf.boolean_mask(outputs[0], mask)]
        loss = sum(tf.reduce_sum(tf.sin(y) * (i + 1.3)) for i, y in enumerate(outputs))
    gradients = tape.gradient(loss, [x, *weights])
    found = {f"output{i}": y for i, y in enumerate(outputs)}
    found |= {f"gradient{i}": g for i, g in enumerate(gradients)}
    for i, w in enumerate(layer.non_trainable_variables):
        if "moving" in w.path or "update_count" in w.path:
            found[f"statistic{i}"] = w
    return {k: keras.ops.convert_to_numpy(v) for k, v in found.items()}


def randomize(layer, rng):
    for w in layer.weights:
        name = w.path.rsplit("/", 1)[-1]
        if name == "seed_generator_state":
            continue
        value = rng.normal(0.0, 0.5, w.shape)
        if name == "moving_variance":
            value = rng.uniform(0.3, 3.0, w.shape)
        elif name == "gamma":
            value = rng.uniform(0.5, 1.5, w.shape)
        elif name == "update_count":
            value = np.float64(7)
        w.assign(value)


def write(path):
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, T, D))
    mask_of = masks(rng)
    arrays = {"x": x, **{f"mask/{k}": m for k, m in mask_of.items() if k != "none"}}
    # Compressed as one: the models have most of their bytes in common.
    with tarfile.open(path, "w:xz") as archive:

        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for name, layer in layers().items():
            batch_size = B if name.endswith("stateful") else None
            inputs = keras.Input((T, D), batch_size=batch_size, dtype="float64")
            model = keras.Sequential([inputs, layer])
            randomize(layer, rng)
            with tempfile.TemporaryDirectory() as directory:
                file = pathlib.Path(directory, "model.keras")
                model.save(file)
                add(f"{name}.keras", file.read_bytes())
            found = answers(name, layer, x, mask_of)
            arrays |= {f"{name}/{key}": value for key, value in found.items()}
        names = {name: [a.dtype.str, a.shape] for name, a in arrays.items()}
        add("arrays.json", json.dumps(names).encode())
        add("arrays.bin", b"".join(a.tobytes() for a in arrays.values()))


def read(directory):
    """Unpacks the models of `FILE` into a directory.

    Returns:
        Dict from names to arrays: `x`, `mask/...`, and `CASE/...` for each case.
    """
    with tarfile.open(FILE) as archive:
        archive.extractall(directory, filter="data")
    data = pathlib.Path(directory, "arrays.bin").read_bytes()
    arrays, start = {}, 0
    names = json.loads(pathlib.Path(directory, "arrays.json").read_text())
    for name, (dtype, shape) in names.items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += arrays[name].nbytes
    return arrays


if __name__ == "__main__":
    write(sys.argv[1])
