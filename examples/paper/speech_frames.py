"""Spoken digits, frame by frame: a deep bidirectional LSTM, normalised or not.

The speech experiment of Laurent et al., "Batch Normalized Recurrent Neural Networks"
(arXiv 1510.01378), on data that anybody may have: instead of the Wall Street Journal
corpus, strings of three to seven digits spliced from the recordings of the Free Spoken
Digit Dataset. Five layers of 250 units each way name the word at each frame; sequence-
wise statistics leave padding out.

Strings: one speaker each, every recording once in each pass over them. Pauses of 50
to 450 ms stand before, between and after the words, each word is up to 6 dB louder or
softer, and faint noise lies under all. Splicing depends on --strings-seed alone, so
every epoch and every run train on the same strings.

Features: 123 a frame of 25 ms, every 10 ms: the log energies of 40 mel bands and of
the frame, their first and their second differences, less the mean and by the standard
deviation of the training frames.

Classes: 0 is silence, 1 to 10 are the digits 0 to 9. A frame's class is the word that
stands at the centre of its window.

Loss: cross-entropy summed over the valid frames of a string, its mean over the strings
of a batch. A learning rate for it is some hundred times lower than for a mean over
frames. What is reported is cross-entropy in nats per valid frame and the error rate of
valid frames, of the training strings as they are trained on and of the development
strings, for each epoch, and at the end with exact population statistics in
results.json. With --split speaker, results.json also has the development strings
measured with their own population statistics, which need no labels. Restarted after a
kill, training goes on where it was and ends with the same curve.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
import typing
import wave

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
import training
from keras import ops

import keras_bnrnn

URL = (
    "https://github.com/Jakobovski/free-spoken-digit-dataset/"
    "archive/refs/tags/v1.0.10.zip"
)
FILE_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
DIGITS = range(10)
LEAST_RECORDINGS = 3_000
DEV_INDICES = range(5)  # the official test part

SAMPLE_RATE = 8_000
WORDS = range(3, 8)  # a string
PAUSE = 0.05, 0.45  # seconds, at least and at most
GAIN = 6.0  # decibels, up or down
NOISE = 1e-3  # standard deviation: 60 dB below full scale

SILENCE, CLASSES = 0, 11
WINDOW, HOP = 200, 80  # samples: 25 and 10 ms
FFT_LENGTH = 512  # more than the window: the lowest mel bands are narrow
BANDS, LOWEST, HIGHEST = 40, 20.0, 4_000.0  # Hz
FLOOR = 1e-8  # of energies; the faintest band of the noise has some 1e-5
FEATURES = 3 * (BANDS + 1)

LENGTHS = 100  # batches are padded to a multiple of it: few shapes to compile
SORTED_TOGETHER = 4  # batches of like lengths come from as many batches of strings
LAYERS = {"none": "LSTM", "input": "BNLSTM", "joint": "BNLSTM joint"}
NOT_CONFIGURATION = {"output_dir", "data_dir", "epochs"}
SMOKE = {"layers": 2, "units": 8, "batch_size": 8}
SMOKE_STRINGS = {"train": 32, "dev": 12}


class Recording(typing.NamedTuple):
    digit: int
    speaker: str
    index: int
    samples: np.ndarray  # (S,), float32 in [-1, 1)


class String(typing.NamedTuple):
    """Words with pauses, as sound."""

    speaker: str
    samples: np.ndarray  # (S,), float32
    classes: np.ndarray  # (S,), int32: what stands at each sample


class Utterance(typing.NamedTuple):
    """The same as frames."""

    features: np.ndarray  # (T, 123), float32
    classes: np.ndarray  # (T,), int32


def main(argv=None):
    run(parse_arguments(argv))
    return 0


def run(arguments):
    """Trains and evaluates what the arguments ask for.

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
    print(f"{LAYERS[arguments.normalize]}: {model.count_params():,} weights")
    order = training.EpochOrder(len(utterances["train"]), arguments.seed)
    rows = training.fit(
        model,
        training_batches(utterances["train"], arguments.batch_size, order),
        batches(utterances["dev"], arguments.batch_size),
        folder=arguments.output_dir,
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
    results = {"epochs": rows, **evaluate(model, utterances, arguments)}
    path = pathlib.Path(arguments.output_dir) / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"Results: {path}")
    return rows


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        help="what is for development; official: the first five recordings of each "
        "digit by each speaker; speaker: all those of --held-out (default: official)",
    )
    add(
        "--held-out",
        nargs="+",
        metavar="SPEAKER",
        help="for --split speaker (default: the last two in alphabetical order)",
    )
    add(
        "--passes",
        type=training.positive,
        default=2,
        help="strings that each recording stands in (default: 2)",
    )
    add("--strings-seed", type=int, default=1, help="of the splicing (default: 1)")
    add(
        "--normalize",
        choices=LAYERS,
        default="input",
        help="what is batch-normalised; none: keras.layers.LSTM (default: input)",
    )
    add(
        "--statistics",
        choices=("sequence", "frame"),
        default="sequence",
        help="over what a minibatch's mean and variance are taken (default: sequence)",
    )
    add("--layers", type=training.positive, default=5, help="(default: 5)")
    add(
        "--units",
        type=training.positive,
        default=250,
        help="of each layer, each way (default: 250)",
    )
    add(
        "--optimizer",
        choices=("sgd", "adam"),
        default="sgd",
        help="(default: sgd)",
    )
    add(
        "--learning-rate",
        type=positive_float,
        default=7.8e-4,
        help="of a loss that is summed over frames; constant (default: 7.8e-4)",
    )
    add("--momentum", type=training.fraction, help="of sgd (default: 0.5)")
    add("--nesterov", action="store_true", help="Nesterov's momentum, for sgd")
    add(
        "--clip-norm",
        type=positive_float,
        default=1_000.0,
        help="bound of the gradient's global norm (default: 1000)",
    )
    add(
        "--batch-size",
        type=training.positive,
        default=64,
        help="strings (default: 64)",
    )
    training.add_arguments(parser, output_dir="runs/speech_frames", epochs=30)
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


def positive_float(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0. Received: {text}")
    return value


def load(arguments):
    """Features and classes of the strings that the arguments ask for.

    Returns:
        Dict of `train` and `dev`, each a list of `Utterance`.
    """
    recordings = read_recordings(arguments.data_dir or download(), arguments.smoke)
    parts = split(recordings, arguments.held_out, arguments.split)
    if not arguments.smoke:
        require_every_digit(parts, recordings, arguments)
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


def download():
    """The folder of the published data set, downloaded if it is not there yet."""
    try:
        folder = keras.utils.get_file(
            "free-spoken-digit-dataset", URL, extract=True, archive_format="zip"
        )
    except Exception as error:  # Keras raises no narrower one
        raise SystemExit(
            f"The Free Spoken Digit Dataset cannot be downloaded: {error}. "
            f"Get and unpack {URL} by other means, and name the folder with --data-dir."
        ) from error
    # The archive has one folder, which bears its version.
    return next(pathlib.Path(folder).glob("free-spoken-digit-dataset-*"), folder)


def read_recordings(data_dir, partial=False):
    """All recordings of a folder, in the order of their file names.

    Args:
        data_dir: Folder of the WAV files, or of a folder `recordings` of them.
        partial: Whether less than the whole data set will do.

    Raises:
        SystemExit: If a file is missing or not as it is published; it says where to
            get it.
    """
    folder = pathlib.Path(data_dir)
    if (folder / "recordings").is_dir():
        folder = folder / "recordings"

    def refuse(path, reason):
        raise SystemExit(
            f"--data-dir must hold the Free Spoken Digit Dataset: {LEAST_RECORDINGS:,} "
            "files {digit}_{speaker}_{index}.wav, 8 kHz, 16 bits, mono, by themselves "
            f"or in a folder `recordings`. Cannot use {path}: {reason}. Get it from "
            f"{URL}"
        )

    if not folder.is_dir():
        refuse(folder, "there is no such folder")
    paths = sorted(folder.glob("*.wav"))
    if not paths or (not partial and len(paths) < LEAST_RECORDINGS):
        refuse(folder, f"it has {len(paths):,} WAV files")
    recordings = []
    for path in paths:
        named = FILE_NAME.fullmatch(path.name)
        if not named:
            refuse(path, "its name is not {digit}_{speaker}_{index}.wav")
        digit, speaker, index = named.groups()
        try:
            samples = read_wav(path)
        except (OSError, EOFError, wave.Error, ValueError) as error:
            refuse(path, str(error) or "it ends before the sound begins")
        recordings.append(Recording(int(digit), speaker, int(index), samples))
    return recordings


def read_wav(path):
    """(S,), float32 in [-1, 1).

    Raises:
        ValueError: If the file has no sound, or one of another format.
    """
    with wave.open(str(path), "rb") as file:
        found = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
        if found != (1, 16, SAMPLE_RATE):
            raise ValueError("channels {}, bits {}, sample rate {} Hz".format(*found))
        sound, count = file.readframes(file.getnframes()), file.getnframes()
    if len(sound) != 2 * count or not count:
        raise ValueError(f"it has {len(sound)} bytes of sound for {count} samples")
    return np.frombuffer(sound, "<i2").astype("float32") / np.float32(2**15)


def split(recordings, held_out=None, by="official"):
    """The recordings of training and those of development.

    Args:
        recordings: List of `Recording`.
        held_out: Speakers to develop on, by="speaker". Default: the last two.
        by: "official" or "speaker".

    Returns:
        Dict of `train` and `dev`, each a list.
    """
    speakers = sorted({recording.speaker for recording in recordings})
    if by == "speaker":
        held_out = held_out or speakers[-2:]
        unknown = sorted(set(held_out) - set(speakers))
        if unknown or not set(speakers) - set(held_out):
            raise SystemExit(
                f"--held-out must be some, not all, of {', '.join(speakers)}. "
                f"Received: {' '.join(held_out)}"
            )
    parts = {"train": [], "dev": []}
    for recording in recordings:
        if by == "speaker":
            dev = recording.speaker in held_out
        else:
            dev = recording.index in DEV_INDICES
        parts["dev" if dev else "train"].append(recording)
    for part, of_part in parts.items():
        if not of_part:
            raise SystemExit(
                f"--split {by} leaves no recording for the part {part!r} of the "
                f"{len(recordings)} in --data-dir"
            )
    return parts


def require_every_digit(parts, recordings, arguments):
    """Refuses data in which a speaker of a part never says some digit."""
    everyone = {recording.speaker for recording in recordings}
    for part, of_part in parts.items():
        said = {(recording.speaker, recording.digit) for recording in of_part}
        if arguments.split == "speaker":
            everyone = {recording.speaker for recording in of_part}
        missing = [
            f"{digit} by {speaker}"
            for speaker in sorted(everyone)
            for digit in DIGITS
            if (speaker, digit) not in said
        ]
        if missing:
            raise SystemExit(
                f"--split {arguments.split} needs each digit by each speaker in the "
                f"part {part!r}. Missing in {arguments.data_dir}: {', '.join(missing)}"
            )


def splice_strings(recordings, passes, generator):
    """Strings in which each recording stands once for each pass, in mixed order."""
    strings = []
    for _ in range(passes):
        for speaker in sorted({recording.speaker for recording in recordings}):
            words = [r for r in recordings if r.speaker == speaker]
            generator.shuffle(words)
            while words:
                count = words_of_string(len(words), generator)
                strings.append(splice(words[:count], generator))
                del words[:count]
    generator.shuffle(strings)
    return strings


def words_of_string(left, generator):
    """How many words to take so that those left over make strings too."""
    counts = [n for n in WORDS if left == n or left - n >= WORDS.start]
    return int(generator.choice(counts or [left]))


def splice(words, generator):
    """One string: words at chance levels, pauses around them, noise under all."""

    def pause():
        return int(generator.uniform(*PAUSE) * SAMPLE_RATE)

    sound, classes = [np.zeros(pause(), "float32")], []
    classes.append(np.full(len(sound[0]), SILENCE, "int32"))
    for word in words:
        gain = 10 ** (generator.uniform(-GAIN, GAIN) / 20)
        silence = np.zeros(pause(), "float32")
        sound += [np.float32(gain) * word.samples, silence]
        classes += [
            np.full(len(word.samples), 1 + word.digit, "int32"),
            np.full(len(silence), SILENCE, "int32"),
        ]
    samples = np.concatenate(sound)
    samples += np.float32(NOISE) * generator.standard_normal(len(samples), "float32")
    return String(words[0].speaker, samples, np.concatenate(classes))


def to_frames(string):
    """Features of each window, and the class at its centre."""
    static = log_energies(string.samples).numpy()
    first = differences(static)
    features = np.concatenate([static, first, differences(first)], axis=1)
    centres = HOP * np.arange(len(features)) + WINDOW // 2
    return Utterance(features, string.classes[centres])


# With a signature, for strings of all lengths are to share one graph.
@tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
def log_energies(samples):
    """Logs of the energies of 40 mel bands and of the whole window.

    Args:
        samples: (S,).

    Returns:
        (T, 41), in nats; windows that the string does not fill are left out.
    """
    spectrum = tf.signal.stft(samples, WINDOW, HOP, FFT_LENGTH)
    power = tf.square(tf.abs(spectrum))  # (T, 257)
    mel = tf.signal.linear_to_mel_weight_matrix(
        BANDS, FFT_LENGTH // 2 + 1, SAMPLE_RATE, LOWEST, HIGHEST
    )
    whole = tf.reduce_sum(power, axis=1, keepdims=True)
    return tf.math.log(tf.concat([power @ mel, whole], axis=1) + FLOOR)


def differences(values):
    """Slopes over five frames, by regression: (T, F) -> (T, F).

    `d_t = sum_k k (c_{t+k} - c_{t-k}) / (2 sum_k k^2)`, k = 1, 2, as in HTK, with the
    first and the last frame repeated at the ends.
    """
    count = len(values)
    padded = np.pad(values, ((2, 2), (0, 0)), mode="edge")

    def shifted(by):
        return padded[2 + by : 2 + by + count]

    return (shifted(1) - shifted(-1) + 2 * (shifted(2) - shifted(-2))) / 10


def standardized(utterances):
    """Features less their means, by their standard deviations, of training frames."""
    frames = np.concatenate([u.features for u in utterances["train"]])
    mean = frames.mean(axis=0, dtype="float64")
    deviation = frames.std(axis=0, dtype="float64")
    return {
        part: [
            u._replace(features=((u.features - mean) / deviation).astype("float32"))
            for u in of_part
        ]
        for part, of_part in utterances.items()
    }


def training_batches(utterances, batch_size, order):
    """Batches of strings of like lengths, drawn in the order of the epoch.

    The rest that fills no batch waits for another epoch: frame-wise statistics of a
    few strings would be noise, and of a single one do not exist.
    """
    lengths = tf.constant([len(u.classes) for u in utterances])
    count = order.count // batch_size

    def by_length(numbers):
        return tf.gather(numbers, tf.argsort(tf.gather(lengths, numbers)))

    numbers = (
        order.dataset()
        .take(count * batch_size)
        .batch(SORTED_TOGETHER * batch_size)
        .map(by_length)
        .unbatch()
        .batch(batch_size, drop_remainder=True)
        # At the end of a data set of unknown size Keras makes one update too many.
        .apply(tf.data.experimental.assert_cardinality(count))
    )
    return padded(numbers, utterances)


def batches(utterances, batch_size):
    """All strings, from the shortest to the longest."""
    numbers = np.argsort([len(u.classes) for u in utterances], kind="stable")
    return padded(
        tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size), utterances
    )


def padded(numbers, utterances):
    """Features, classes and weights of batches of strings, given by their numbers.

    Padding has zeros in all three. No real frame is zero in all of its features, so
    `keras.layers.Masking` finds it.
    """
    lengths = np.array([len(u.classes) for u in utterances])
    features = tf.concat([u.features for u in utterances], axis=0)
    classes = tf.concat([u.classes for u in utterances], axis=0)
    features = tf.RaggedTensor.from_row_lengths(features, lengths)
    classes = tf.RaggedTensor.from_row_lengths(classes, lengths)

    def batch(rows):
        chosen, targets = tf.gather(features, rows), tf.gather(classes, rows)
        valid = chosen.row_lengths()
        longest = -(-tf.reduce_max(valid) // LENGTHS) * LENGTHS
        inputs = chosen.to_tensor(shape=tf.stack([-1, longest, FEATURES]))
        return (
            tf.ensure_shape(inputs, [None, None, FEATURES]),
            targets.to_tensor(shape=tf.stack([-1, longest])),
            tf.sequence_mask(valid, longest, tf.float32),
        )

    return numbers.map(batch).prefetch(2)


def build_model(arguments):
    """Bidirectional layers between the features and the classes' logits."""

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
        # Weighted by what `padded` gives: 1 for valid frames, else 0.
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


class StringCrossEntropy(keras.losses.Loss):
    """Summed over the valid frames of a string, averaged over strings: in nats."""

    def __init__(self):
        super().__init__(name="string_cross_entropy", reduction="sum")

    def call(self, classes, logits):
        strings = ops.cast(ops.shape(logits)[0], logits.dtype)
        return cross_entropy(classes, logits) / strings  # (B, T)


class FrameMean(keras.metrics.Mean):
    """Mean of a function of classes and logits over all weighted frames.

    Keras' own would average over the timesteps of each string first, padding
    included, and a batch that is padded further would count less.
    """

    def __init__(self, function, name):
        super().__init__(name=name)
        self.function = function

    def update_state(self, classes, logits, sample_weight):
        values = self.function(classes, logits)
        super().update_state(
            ops.reshape(values, [-1]), ops.reshape(sample_weight, [-1])
        )


def cross_entropy(classes, logits):
    """(B, T), in nats."""
    return keras.losses.sparse_categorical_crossentropy(
        classes, logits, from_logits=True
    )


def is_error(classes, logits):
    """(B, T): 1 where another class has the highest logit."""
    best = ops.argmax(logits, axis=-1)
    return ops.cast(ops.not_equal(best, ops.cast(classes, best.dtype)), "float32")


def evaluate(model, utterances, arguments):
    """Cross-entropy and error rate per frame, by exact population statistics.

    With `--split speaker` a normalised model is evaluated on the development strings
    twice: with the statistics of the training strings, and with those of the
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


def print_table(rows):
    """`train` is the mean over the epoch, while the weights still changed."""
    columns = {
        "frame_cross_entropy": "train nats",
        "val_frame_cross_entropy": "dev nats",
        "frame_error_rate": "train error",
        "val_frame_error_rate": "dev error",
    }
    print("\nepoch" + "".join(f"{title:>13}" for title in columns.values()))
    for row in rows:
        print(f"{row['epoch']:5}" + "".join(f"{row[name]:13.4f}" for name in columns))
    print()


if __name__ == "__main__":
    sys.exit(main())
