"""Strings of spoken digits: splicing, features and classes of frames, batches."""

import typing

import numpy as np
import tensorflow as tf
from spoken_digits import SAMPLE_RATE

WORDS = range(3, 8)  # a string
PAUSE = 0.05, 0.45  # seconds, at least and at most
GAIN = 6.0  # decibels, at most, louder or softer
NOISE = 1e-3  # standard deviation: 60 dB below full scale

SILENCE, CLASSES = 0, 11
WINDOW, HOP = 200, 80  # samples: 25 and 10 ms
FFT_LENGTH = 512  # longer than the window, because the lowest bands are narrow
BANDS, LOWEST, HIGHEST = 40, 20.0, 4_000.0  # Hz
FLOOR = 1e-8  # of energies; the faintest band of the noise has about 1e-5
FEATURES = 3 * (BANDS + 1)

LENGTHS = 100  # batches are padded to a multiple of it, to compile few shapes
SORTED_TOGETHER = 4  # batches whose strings are sorted by length together


class String(typing.NamedTuple):
    """The sound of words with pauses."""

    speaker: str
    samples: np.ndarray  # (S,), float32
    classes: np.ndarray  # (S,), int32: the class at each sample


class Utterance(typing.NamedTuple):
    """The frames of a string."""

    features: np.ndarray  # (T, 123), float32
    classes: np.ndarray  # (T,), int32


def splice_strings(recordings, passes, generator):
    """Splices strings in random order, each recording once in each pass.

    Returns:
        List of `String`.
    """
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
    """Draws a number of words such that the remaining words make strings too."""
    counts = [n for n in WORDS if left == n or left - n >= WORDS.start]
    return int(generator.choice(counts or [left]))


def splice(words, generator):
    """Splices words at random levels, with pauses around them and noise below."""

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
    """Computes the features of each window and takes the class at its centre."""
    static = log_energies(string.samples).numpy()
    first = differences(static)
    features = np.concatenate([static, first, differences(first)], axis=1)
    centres = HOP * np.arange(len(features)) + WINDOW // 2
    return Utterance(features, string.classes[centres])


# The signature lets strings of all lengths share one graph.
@tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
def log_energies(samples):
    """Computes the log energies of 40 mel bands and of the whole window.

    Args:
        samples: Tensor of shape (S,).

    Returns:
        Tensor of shape (T, 41), in nats. Windows that reach beyond the end of the
        string are left out.
    """
    spectrum = tf.signal.stft(samples, WINDOW, HOP, FFT_LENGTH)
    power = tf.square(tf.abs(spectrum))  # (T, 257)
    mel = tf.signal.linear_to_mel_weight_matrix(
        BANDS, FFT_LENGTH // 2 + 1, SAMPLE_RATE, LOWEST, HIGHEST
    )
    whole = tf.reduce_sum(power, axis=1, keepdims=True)
    return tf.math.log(tf.concat([power @ mel, whole], axis=1) + FLOOR)


def differences(values):
    """Computes slopes over five frames by regression, (T, F) -> (T, F).

    `d_t = sum_k k (c_{t+k} - c_{t-k}) / (2 sum_k k^2)`, k = 1, 2, as in HTK. The
    first and the last frame are repeated at the ends.
    """
    count = len(values)
    padded = np.pad(values, ((2, 2), (0, 0)), mode="edge")

    def shifted(by):
        return padded[2 + by : 2 + by + count]

    return (shifted(1) - shifted(-1) + 2 * (shifted(2) - shifted(-2))) / 10


def standardized(utterances):
    """Standardises features by mean and standard deviation of the training frames."""
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
    """Returns batches of strings of similar lengths, shuffled in each epoch.

    Strings that do not fill the last batch are left out of the epoch: frame-wise
    statistics of few strings are noise.
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
        # Keras makes one update too many in an epoch of unknown length.
        .apply(tf.data.experimental.assert_cardinality(count))
    )
    return padded(numbers, utterances)


def batches(utterances, batch_size):
    """Returns batches of all strings, from the shortest to the longest."""
    numbers = np.argsort([len(u.classes) for u in utterances], kind="stable")
    return padded(
        tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size), utterances
    )


def padded(numbers, utterances):
    """Maps batches of numbers to features, classes and weights of strings.

    All three are zero at padding. `keras.layers.Masking` finds the padding, because
    no valid frame is zero in all features.
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
