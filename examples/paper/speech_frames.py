"""Classification of frames of spoken digits by a deep bidirectional LSTM.

This is the speech experiment of Laurent et al., "Batch Normalized Recurrent Neural
Networks" (arXiv 1510.01378), on free data. In place of the Wall Street Journal corpus
it uses strings of three to seven digits, spliced from the recordings of the Free Spoken
Digit Dataset. Five layers of 250 units each way classify each frame. Sequence-wise
statistics exclude padding.

Strings: A string has one speaker. Each pass over the recordings uses every recording
once. Pauses of 50 to 450 ms are before, between and after the words. Each word is up to
6 dB louder or softer, and the whole string has faint noise. Splicing depends on
--strings-seed alone: all epochs and all runs train on the same strings.

Features: 123 for each frame of 25 ms, one frame every 10 ms: the log energies of 40 mel
bands and of the frame, and their first and second differences. They are standardised by
the mean and the standard deviation of the training frames.

Classes: 0 is silence, 1 to 10 are the digits 0 to 9. The class of a frame is the word
at the centre of its window.

Loss: The cross-entropy is summed over the valid frames of a string and averaged over
the strings of a batch. Its learning rate is about a hundred times lower than that of a
mean over frames. The log has the cross-entropy in nats per valid frame and the error
rate of valid frames, of the training and the development strings in each epoch.
results.json has the values with exact population statistics at the end. With --split
speaker it also has those of the development strings with their own population
statistics, which need no labels. After a kill, a restart continues the run and ends
with the same curve.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import options
import spoken_digits
import training
from digit_strings import (
    CLASSES,
    FEATURES,
    SILENCE,
    batches,
    splice_strings,
    standardized,
    to_frames,
    training_batches,
)
from frame_metrics import FrameMean, StringCrossEntropy, cross_entropy, is_error

import keras_bnrnn

COLUMNS = {
    "frame_cross_entropy": "train nats",
    "val_frame_cross_entropy": "dev nats",
    "frame_error_rate": "train error",
    "val_frame_error_rate": "dev error",
}
SMOKE = {"layers": 2, "units": 8, "batch_size": 8}
SMOKE_STRINGS = {"train": 32, "dev": 12}


def main(argv=None):
    run(parse_arguments(argv))
    return 0


def run(arguments):
    """Trains and evaluates the model that the arguments select.

    Returns:
        The log's rows, a dict for each epoch.
    """
    utterances = load(arguments)
    for part, of_part in utterances.items():
        classes = np.concatenate([utterance.classes for utterance in of_part])
        print(
            f"{part}: {len(of_part):,} strings, {len(classes):,} frames, "
            f"{np.mean(classes == SILENCE):.1%} of them silence"
        )
    keras.utils.set_random_seed(arguments.seed)
    model = build_model(arguments)
    print(f"{options.LABELS[arguments.normalize]}: {model.count_params():,} weights")
    order = training.EpochOrder(len(utterances["train"]), arguments.seed)
    rows = training.fit(
        model,
        training_batches(utterances["train"], arguments.batch_size, order),
        batches(utterances["dev"], arguments.batch_size),
        folder=arguments.output_dir,
        epochs=arguments.epochs,
        seed=arguments.seed,
        configuration=options.configuration(arguments),
        order=order,
        hours=arguments.hours,
    )
    training.print_table(rows, COLUMNS, "13.4f")
    results = {"epochs": rows, **evaluate(model, utterances, arguments)}
    training.write_results(arguments.output_dir, results)
    return rows


def parse_arguments(argv):
    parser = options.parser(__doc__)
    add = parser.add_argument
    add(
        "--data-dir",
        help="folder with the WAV files of the Free Spoken Digit Dataset, or with "
        "its folder `recordings` (default: downloaded)",
    )
    add(
        "--split",
        choices=("official", "speaker"),
        default="official",
        help="development part; official: the first five recordings of each digit by "
        "each speaker; speaker: all recordings of --held-out (default: official)",
    )
    add(
        "--held-out",
        nargs="+",
        metavar="SPEAKER",
        help="development speakers, for --split speaker (default: the last two in "
        "alphabetical order)",
    )
    add(
        "--passes",
        type=options.positive,
        default=2,
        help="number of strings with each recording (default: 2)",
    )
    add("--strings-seed", type=int, default=1, help="seed of the splicing (default: 1)")
    add(
        "--normalize",
        choices=options.LABELS,
        default="input",
        help="normalised term; none: keras.layers.LSTM (default: input)",
    )
    options.add_statistics(parser, default="sequence")
    add(
        "--layers",
        type=options.positive,
        default=5,
        help="number of layers (default: 5)",
    )
    add(
        "--units",
        type=options.positive,
        default=250,
        help="units of a layer, each way (default: 250)",
    )
    add(
        "--optimizer",
        choices=("sgd", "adam"),
        default="sgd",
        help="(default: sgd)",
    )
    add(
        "--learning-rate",
        type=options.positive_float,
        default=7.8e-4,
        help="constant learning rate for the sum over frames (default: 7.8e-4)",
    )
    add("--momentum", type=options.fraction, help="momentum of sgd (default: 0.5)")
    add("--nesterov", action="store_true", help="use Nesterov momentum, for sgd")
    add(
        "--clip-norm",
        type=options.positive_float,
        default=1_000.0,
        help="bound of the gradient's global norm (default: 1000)",
    )
    options.add_batch_size(parser, unit="strings", default=64)
    options.add_run(parser, output_dir="runs/speech_frames", epochs=30)
    arguments = parser.parse_args(argv)
    if arguments.optimizer != "sgd":
        for name in ("momentum", "nesterov"):
            if getattr(arguments, name):
                parser.error(
                    f"--{name} is for --optimizer sgd. "
                    f"Received: --optimizer {arguments.optimizer}"
                )
    elif arguments.momentum is None:
        arguments.momentum = 0.5
    if arguments.held_out and arguments.split != "speaker":
        parser.error(
            "--held-out is for --split speaker. "
            f"Received: {' '.join(arguments.held_out)}"
        )
    if arguments.smoke:
        vars(arguments).update(SMOKE, epochs=min(arguments.epochs, 2))
    return arguments


def load(arguments):
    """Loads the features and classes of the strings that the arguments select.

    Returns:
        Dict of `train` and `dev`, each a list of `Utterance`.
    """
    recordings = spoken_digits.read_recordings(
        arguments.data_dir or spoken_digits.download(), arguments.smoke
    )
    parts = spoken_digits.split(recordings, arguments.held_out, arguments.split)
    if not arguments.smoke:
        spoken_digits.require_every_digit(parts, recordings, arguments)
    utterances = {}
    for number, (part, of_part) in enumerate(parts.items()):
        generator = np.random.default_rng([arguments.strings_seed, number])
        strings = splice_strings(of_part, arguments.passes, generator)
        if arguments.smoke:
            strings = strings[: SMOKE_STRINGS[part]]
        utterances[part] = [to_frames(string) for string in strings]
    if arguments.batch_size > len(utterances["train"]):
        raise SystemExit(
            f"--batch-size must be at most the {len(utterances['train'])} training "
            f"strings. Received: {arguments.batch_size}"
        )
    return standardized(utterances)


def build_model(arguments):
    """Builds and compiles the model from features to logits of the classes."""

    def recurrent(number):
        if arguments.normalize == "none":
            layer = keras.layers.LSTM(arguments.units, return_sequences=True)
        else:
            layer = keras_bnrnn.BNLSTM(
                arguments.units,
                normalize=arguments.normalize,
                statistics=arguments.statistics,
                return_sequences=True,
            )
        return keras.layers.Bidirectional(layer, name=f"bidirectional_{number}")

    model = keras.Sequential(
        [
            keras.Input((None, FEATURES), name="features"),
            keras.layers.Masking(),
            *(recurrent(number) for number in range(1, arguments.layers + 1)),
            keras.layers.Dense(CLASSES, name="logits"),
        ]
    )
    model.compile(
        optimizer=build_optimizer(arguments),
        loss=StringCrossEntropy(),
        # The weights of `padded`: 1 for valid frames, else 0.
        weighted_metrics=[
            FrameMean(cross_entropy, name="frame_cross_entropy"),
            FrameMean(is_error, name="frame_error_rate"),
        ],
    )
    return model


def build_optimizer(arguments):
    if arguments.optimizer == "adam":
        return keras.optimizers.Adam(
            arguments.learning_rate, global_clipnorm=arguments.clip_norm
        )
    return keras.optimizers.SGD(
        arguments.learning_rate,
        momentum=arguments.momentum,
        nesterov=arguments.nesterov,
        global_clipnorm=arguments.clip_norm,
    )


def evaluate(model, utterances, arguments):
    """Evaluates the model with exact population statistics.

    With `--split speaker` a normalised model is evaluated on the development strings
    twice: with the statistics of the training strings, then with those of the
    development strings, which need no labels. The model keeps the latter.

    Returns:
        Dict of `train`, `dev` and, for a normalised model and new speakers,
        `dev_recalibrated`, each a dict from a metric's name to its value.
    """
    results = {}

    def measure(name, part):
        results[name] = model.evaluate(
            batches(utterances[part], arguments.batch_size), verbose=0, return_dict=True
        )
        print(
            f"{name}: {results[name]['frame_cross_entropy']:.4f} nats a frame, "
            f"frame error {results[name]['frame_error_rate']:.2%}"
        )

    normalized = arguments.normalize != "none"
    if normalized:
        print("Exact population statistics of the training strings")
        keras_bnrnn.recalibrate(
            model, batches(utterances["train"], arguments.batch_size)
        )
    for part in utterances:
        measure(part, part)
    if normalized and arguments.split == "speaker":
        print("Exact population statistics of the development strings")
        keras_bnrnn.recalibrate(model, batches(utterances["dev"], arguments.batch_size))
        measure("dev_recalibrated", "dev")
    return results


if __name__ == "__main__":
    sys.exit(main())
