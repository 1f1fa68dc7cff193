"""Classification of handwritten digits, pixel by pixel, by one recurrent layer.

A sequence is an image, row by row from the top left, with one pixel in [0, 1] at each
timestep. The state after the last pixel gives the digit. By default the images are the
1,797 digits of 8 x 8 pixels that scikit-learn ships (64 timesteps). --mnist uses those
of MNIST (784 timesteps, sequential MNIST). --permute puts the pixels into one random
order, the same for all images (pMNIST).

The program prints accuracy and loss of the training and development images for each
epoch. Then it computes the exact population statistics of the training images, and
writes all values with the accuracy on the test images to results.json. After a kill, a
restart continues the run and ends with the same curve.

The input has a single feature, which matters for batch normalisation:

- `w x_t` of a unit has one mean and one variance. After normalisation it is the
  standardised pixel, and little more than the sign of `w` remains: gamma learns the
  scale.
- With --statistics frame each timestep has its own mean and variance. A pixel that is
  equal in all images of the batch, such as a 0 at the border, has variance 0. Epsilon
  keeps the division finite, the result is beta, and the timestep carries no
  information. If few images differ, they are up to sqrt(batch size) deviations from
  the mean.
- Training with --statistics frame removes the mean image. The development and test
  images are normalised by one mean and one variance for all timesteps, which does not
  remove it, and their accuracy suffers. The default is therefore --statistics sequence.
- --normalize joint is always frame-wise, because the sum with the recurrent term exists
  one timestep at a time. Its population statistics depend on themselves. They take up
  to 50 passes over the images, and a warning says if they did not converge.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import options
import tensorflow as tf
import training
from handwritten_digits import CLASSES, Digits, mnist, permuted, small

import keras_bnrnn

CLIP_NORM = 1.0  # gradients through hundreds of timesteps explode occasionally
LAYERS = {
    "lstm": (keras.layers.LSTM, keras_bnrnn.BNLSTM),
    "gru": (keras.layers.GRU, keras_bnrnn.BNGRU),
    "simple_rnn": (keras.layers.SimpleRNN, keras_bnrnn.BNSimpleRNN),
}
COLUMNS = {
    "accuracy": "train accuracy",
    "val_accuracy": "dev accuracy",
    "loss": "train loss",
    "val_loss": "dev loss",
}
OPTIMIZERS = {"adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}


def main(argv=None):
    arguments = parse_arguments(argv)
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
        folder=arguments.output_dir,
        epochs=arguments.epochs,
        seed=arguments.seed,
        configuration=options.configuration(arguments),
        order=order,
        hours=arguments.hours,
    )
    training.print_table(rows, COLUMNS, "16.3f")
    results = {"epochs": rows, **evaluate(model, parts, arguments)}
    training.write_results(arguments.output_dir, results)
    return 0


def parse_arguments(argv):
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--mnist", action="store_true", help="use MNIST: 28 x 28 pixels")
    add(
        "--data-dir",
        help="folder with mnist.npz, for --mnist (default: downloaded by Keras)",
    )
    add("--permute", action="store_true", help="put the pixels into a random order")
    add(
        "--layer",
        choices=LAYERS,
        default="lstm",
        help="the recurrent layer (default: lstm)",
    )
    add(
        "--units",
        type=options.positive,
        default=100,
        help="units of the layer (default: 100)",
    )
    add(
        "--normalize",
        choices=options.LABELS,
        default="input",
        help="normalised term; none: a stock Keras layer (default: input)",
    )
    options.add_statistics(parser, default="sequence")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adam",
        help="optimizer; it clips gradients at a global norm of 1 (default: adam)",
    )
    add(
        "--learning-rate",
        type=options.positive_float,
        default=1e-2,
        help="constant learning rate (default: 0.01)",
    )
    options.add_batch_size(parser, unit="images", default=64)
    options.add_run(parser, output_dir="runs/sequential_digits", epochs=40)
    arguments = parser.parse_args(argv)
    if arguments.data_dir and not arguments.mnist:
        parser.error(f"--data-dir is for --mnist. Received: {arguments.data_dir}")
    if arguments.smoke:
        arguments.units, arguments.batch_size = 8, 64
        arguments.epochs = min(arguments.epochs, 2)
    return arguments


def load(arguments):
    """Loads the images that the arguments select.

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
    """Returns batches of the training images in the order of the epoch.

    Images that do not fill the last batch are left out of the epoch: frame-wise
    statistics of few images are noise.
    """
    pixels, labels = (tf.constant(a) for a in digits)
    return (
        order.dataset()
        .batch(batch_size, drop_remainder=True)
        .map(lambda i: (tf.gather(pixels, i), tf.gather(labels, i)))
        .prefetch(2)
    )


def batches(digits, batch_size):
    return tf.data.Dataset.from_tensor_slices(tuple(digits)).batch(batch_size)


def evaluate(model, parts, arguments):
    """Evaluates the model with exact population statistics on new images.

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


if __name__ == "__main__":
    sys.exit(main())
