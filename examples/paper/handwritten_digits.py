"""Images of handwritten digits as sequences of pixels, from scikit-learn or MNIST."""

import pathlib
import typing
import zipfile
import zlib

import keras
import numpy as np
import options

try:
    import sklearn.datasets
    import sklearn.model_selection
except ImportError as error:
    raise SystemExit(options.missing(error)) from error

CLASSES = 10
# Size of the development part of scikit-learn's digits, and of the test part.
HELD_OUT = 300
MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"


class Digits(typing.NamedTuple):
    """Images as sequences, with their labels."""

    pixels: np.ndarray  # (B, T, 1), float32 in [0, 1]
    labels: np.ndarray  # (B,), int64 in 0..9


def small(seed):
    """Splits scikit-learn's digits by the seed, with the same classes in each part.

    Returns:
        Dict of `train`, `dev` and `test`, each `Digits`.
    """
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
    """Reads or downloads MNIST.

    The last sixth of the training images, 10,000, are the development part.

    Returns:
        Dict of `train`, `dev` and `test`, each `Digits`.
    """
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
    """Reads `mnist.npz` of a folder as `keras.datasets.mnist.load_data()` does.

    Raises:
        SystemExit: If the file or one of its arrays differs from the published ones;
            the message says where to get the file.
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
    """Returns why these cannot be MNIST's images and labels, or `None`."""
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
    """Reshapes (B, H, W) to (B, H*W, 1), row by row from the top left."""
    return images.reshape(len(images), -1, 1).astype("float32")


def permuted(parts, seed):
    """Puts the timesteps of all images into one random order."""
    timesteps = parts["train"].pixels.shape[1]
    order = np.random.default_rng(seed).permutation(timesteps)
    return {
        part: digits._replace(pixels=digits.pixels[:, order])
        for part, digits in parts.items()
    }
