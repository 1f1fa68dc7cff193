"""Handwritten digits, read pixel by pixel: a long-range test of a recurrent layer.

The images come as a sequence, one pixel in [0, 1] at each timestep, row by row from
the top left; after the last pixel the state of one recurrent layer names the digit.
By default these are the 1,797 digits of 8 x 8 pixels that scikit-learn ships, 64
timesteps; with --mnist those of MNIST, 784 timesteps (sequential MNIST). --permute
puts the pixels in a fixed order by chance, the same for all images (pMNIST).

Prints accuracy and loss of training and development images for each epoch, then gives
a normalised layer the exact population statistics of the training images, and writes
all of it with the accuracy on the test images to results.json. Restarted after a kill,
training goes on where it was and ends with the same curve.

What a single pixel as the input means for batch normalisation:

- `w x_t` has one mean and one variance for all that a unit sees, so normalised it is
  the standardised pixel, and of `w` hardly more than the sign is left: gamma learns the
  scale that `w` had.
- With --statistics frame each timestep has a mean and a variance of its own. Where a
  pixel is the same in every image of the batch, 0 at the border for one, the variance
  is 0: epsilon keeps the division finite, the result is beta, and that timestep tells
  the layer nothing. Where it is nearly so, the few images that differ come out up to
  sqrt(batch size) deviations from the mean.
- Training with --statistics frame takes the mean image away; the development and test
  images, however, are normalised by one mean and one variance for all timesteps, which
  does not. The border shows the difference, and their accuracy suffers. It is why the
  default is --statistics sequence, where both are of all pixels together.
- --normalize joint is frame-wise whatever --statistics says: its sum with the recurrent
  term exists one timestep at a time. Its population statistics depend on themselves:
  they take up to 50 passes over the images, and a warning says if they did not settle.
"""

import argparse
import json
import os
import pathlib
import sys
import typing
import zipfile
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
import training

import keras_bnrnn

try:
    import sklearn.datasets
    import sklearn.model_selection
except ImportError as error:
    raise SystemExit(training.missing(error)) from error

CLASSES = 10
HELD_OUT = 300  # of scikit-learn's digits, for development and as many for the test
MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
CLIP_NORM = 1.0  # gradients through hundreds of timesteps explode now and then
LAYERS = {
    "lstm": (keras.layers.LSTM, keras_bnrnn.BNLSTM),
    "gru": (keras.layers.GRU, keras_bnrnn.BNGRU),
    "simple_rnn": (keras.layers.SimpleRNN, keras_bnrnn.BNSimpleRNN),
}
OPTIMIZERS = {"adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}
NOT_CONFIGURATION = {"output_dir", "data_dir", "epochs"}


class Digits(typing.NamedTuple):
    """Images as sequences, and what they show."""

    pixels: np.ndarray  # (B, T, 1), float32 in [0, 1]
    labels: np.ndarray  # (B,), int64 in 0..9


def main(argv=None):
    arguments = parse_arguments(argv)
    output = pathlib.Path(arguments.output_dir)
    parts = load(arguments)
    timesteps = parts["train"].pixels.shape[1]
    print(
        "Images: "
        + ", ".join(f"{part} {len(labels):,}" for part, (_, labels) in parts.items())
        + f"; {timesteps} timesteps"
    )

    keras.utils.set_random_seed(arguments.seed)
    model = build_model(timesteps, arguments)
    print(f"Model: {model.count_params():,} weights")
    order = training.EpochOrder(len(parts["train"].labels), arguments.seed)
    rows = training.fit(
        model,
        training_batches(parts["train"], order, arguments.batch_size),
        batches(parts["dev"], arguments.batch_size),
        folder=output,
        epochs=arguments.epochs,
        seed=arguments.seed,
        configuration={
            name: value
            for name, value in vars(arguments).items()
            if name not in NOT_CONFIGURATION
        },
        order=order,
        hours=arguments.hours,
    )
    print_table(rows)
    results = {"epochs": rows, **evaluate(model, parts, arguments)}
    path = output / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"Results: {path}")
    return 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mnist", action="store_true", help="28 x 28 pixels instead of 8 x 8")
    add(
        "--data-dir",
        help="folder with mnist.npz, for --mnist (default: downloaded by Keras)",
    )
    add("--permute", action="store_true", help="pixels in a fixed order by chance")
    add(
        "--layer",
        choices=LAYERS,
        default="lstm",
        help="the recurrent layer (default: lstm)",
    )
    add(
        "--units",
        type=training.positive,
        default=100,
        help="of that layer (default: 100)",
    )
    add(
        "--normalize",
        choices=("none", "input", "joint"),
        default="input",
        help="what is batch-normalised; none: a stock Keras layer (default: input)",
    )
    add(
        "--statistics",
        choices=("sequence", "frame"),
        default="sequence",
        help="over what a minibatch's mean and variance are taken (default: sequence)",
    )
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adam",
        help="of Keras, gradients clipped at a global norm of 1 (default: adam)",
    )
    add(
        "--learning-rate",
        type=float,
        default=1e-2,
        help="constant (default: 0.01)",
    )
    add(
        "--batch-size",
        type=training.positive,
        default=64,
        help="images (default: 64)",
    )
    training.add_arguments(parser, output_dir="runs/sequential_digits", epochs=40)
    arguments = parser.parse_args(argv)
    if arguments.data_dir and not arguments.mnist:
        parser.error(f"--data-dir is for --mnist. Received: {arguments.data_dir}")
    if not arguments.learning_rate > 0:
        parser.error(
            f"--learning-rate: must be above 0. Received: {arguments.learning_rate}"
        )
    if arguments.smoke:
        arguments.units, arguments.batch_size = 8, 64
        arguments.epochs = min(arguments.epochs, 2)
    return arguments


def load(arguments):
    """The images that the arguments ask for.

    Returns:
        Dict of `train`, `dev` and `test`, each `Digits`.
    """
    parts = mnist(arguments.data_dir) if arguments.mnist else small(arguments.seed)
    if arguments.smoke:
        parts = {
            part: Digits(pixels[:256], labels[:256])
            for part, (pixels, labels) in parts.items()
        }
    if arguments.permute:
        parts = permuted(parts, arguments.seed)
    count = len(parts["train"].labels)
    if arguments.batch_size > count:
        raise SystemExit(
            f"--batch-size must be at most the {count} training images. "
            f"Received: {arguments.batch_size}"
        )
    return parts


def small(seed):
    """scikit-learn's digits, split by the seed with the same classes in each part."""
    digits = sklearn.datasets.load_digits()
    pixels, labels = sequences(digits.images / 16), digits.target

    def split(rows):
        return sklearn.model_selection.train_test_split(
            rows, test_size=HELD_OUT, stratify=labels[rows], random_state=seed
        )

    rest, test = split(np.arange(len(labels)))
    train, dev = split(rest)
    return {
        part: Digits(pixels[rows], labels[rows])
        for part, rows in (("train", train), ("dev", dev), ("test", test))
    }


def mnist(data_dir=None):
    """MNIST; the last sixth of its training images, 10,000, are for development."""
    train, test = read_mnist(data_dir) if data_dir else download_mnist()
    (images, labels), dev = train, len(train[1]) // 6
    return {
        part: Digits(sequences(images / np.float32(255)), labels.astype("int64"))
        for part, (images, labels) in (
            ("train", (images[:-dev], labels[:-dev])),
            ("dev", (images[-dev:], labels[-dev:])),
            ("test", test),
        )
    }


def download_mnist():
    try:
        return keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises no narrower one
        raise SystemExit(
            f"MNIST cannot be downloaded: {error}. Get {MNIST_URL} by other means, "
            "and name its folder with --data-dir."
        ) from error


def read_mnist(data_dir):
    """`mnist.npz` of a folder, as `keras.datasets.mnist.load_data()` returns it.

    Raises:
        SystemExit: If the file or one of its arrays is not as it is published; it
            says where to get it.
    """
    path = pathlib.Path(data_dir) / "mnist.npz"

    def refuse(reason):
        raise SystemExit(
            "--data-dir must hold mnist.npz as Keras publishes it: x_train and x_test, "
            "uint8 of shape (images, 28, 28), with y_train and y_test, integers 0 to 9 "
            f"of shape (images,). Cannot use {path}: {reason}. Get it from {MNIST_URL}"
        )

    try:
        with path.open("rb") as opened:
            file = np.load(opened)
            arrays = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        refuse(error)
    if arrays is None:
        refuse("it is one array, not an archive of several")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        if name not in arrays:
            found = ", ".join(sorted(arrays)) or "nothing"
            refuse(f"{name} is missing; it has {found}")
    for part, least in (("train", 6), ("test", 1)):
        reason = what_is_wrong(part, arrays[f"x_{part}"], arrays[f"y_{part}"], least)
        if reason:
            refuse(reason)
    return (
        (arrays["x_train"], arrays["y_train"]),
        (arrays["x_test"], arrays["y_test"]),
    )


def what_is_wrong(part, images, labels, least):
    """Why these cannot be MNIST's images and labels, or None."""
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        return f"x_{part} is {images.dtype} of shape {images.shape}"
    if len(images) < least:
        return f"x_{part} has {len(images)} images"
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        return (
            f"y_{part} is {labels.dtype} of shape {labels.shape} "
            f"for {len(images)} images"
        )
    if labels.min() < 0 or labels.max() >= CLASSES:
        return f"y_{part} has values from {labels.min()} to {labels.max()}"
    return None


def sequences(images):
    """(B, H, W) -> (B, H*W, 1): row by row, from the top left."""
    return images.reshape(len(images), -1, 1).astype("float32")


def permuted(parts, seed):
    """The same images with their timesteps in another order, one for all of them."""
    timesteps = parts["train"].pixels.shape[1]
    order = np.random.default_rng(seed).permutation(timesteps)
    return {
        part: digits._replace(pixels=digits.pixels[:, order])
        for part, digits in parts.items()
    }


def build_model(timesteps, arguments):
    stock, normalized = LAYERS[arguments.layer]
    if arguments.normalize == "none":
        recurrent = stock(arguments.units, name="recurrent")
    else:
        recurrent = normalized(
            arguments.units,
            normalize=arguments.normalize,
            statistics=arguments.statistics,
            name="recurrent",
        )
    model = keras.Sequential(
        [
            keras.Input((timesteps, 1), name="pixels"),
            recurrent,
            keras.layers.Dense(CLASSES, name="logits"),
        ]
    )
    model.compile(
        optimizer=OPTIMIZERS[arguments.optimizer](
            arguments.learning_rate, global_clipnorm=CLIP_NORM
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def training_batches(digits, order, batch_size):
    """Batches in the order of the epoch.

    The rest that fills no batch waits for another epoch: frame-wise statistics of a
    few images would be noise, and of a single one do not exist.
    """
    pixels, labels = (tf.constant(a) for a in digits)
    return (
        order.dataset()
        # At the end of a data set of unknown size Keras makes one update too many.
        .apply(tf.data.experimental.assert_cardinality(order.count))
        .batch(batch_size, drop_remainder=True)
        .map(lambda i: (tf.gather(pixels, i), tf.gather(labels, i)))
        .prefetch(2)
    )


def batches(digits, batch_size):
    return tf.data.Dataset.from_tensor_slices(tuple(digits)).batch(batch_size)


def evaluate(model, parts, arguments):
    """Losses and accuracies on images not trained on, by exact population statistics.

    Returns:
        Dict of `dev` and `test`, each a dict of `loss` and `accuracy`.
    """
    if arguments.normalize != "none":
        print("Exact population statistics of the training images")
        keras_bnrnn.recalibrate(model, parts["train"].pixels, batch_size=256)
    results = {}
    for part in ("dev", "test"):
        results[part] = model.evaluate(
            batches(parts[part], arguments.batch_size), verbose=0, return_dict=True
        )
        print(
            f"{part}: accuracy {results[part]['accuracy']:.1%}, "
            f"loss {results[part]['loss']:.3f}"
        )
    return results


def print_table(rows):
    """`train` is the mean over the epoch, while the weights still changed."""
    columns = {
        "accuracy": "train accuracy",
        "val_accuracy": "dev accuracy",
        "loss": "train loss",
        "val_loss": "dev loss",
    }
    print("\nepoch" + "".join(f"{title:>16}" for title in columns.values()))
    for row in rows:
        print(f"{row['epoch']:5}" + "".join(f"{row[name]:16.3f}" for name in columns))
    print()


if __name__ == "__main__":
    sys.exit(main())
