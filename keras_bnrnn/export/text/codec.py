"""Converts text to token ids and back in a graph."""

import numpy as np
import tensorflow as tf

from keras_bnrnn.export.text.tokenizers import (
    detokenizer_of,
    require_tensorflow_text,
    vocabulary_of,
    without_cache,
)

PADDING = ("", "<pad>", "[PAD]")
CHANGES_TABLES = ("LookupTableInsert", "LookupTableRemove", "MutableHashTable")


class Codec(tf.Module):
    """Converts text to token ids and back, and holds the tables of the tokenizer.

    Args:
        front_end: `TextFrontEnd`.

    Raises:
        ValueError: If the tokenizer runs Python, changes tables or does not return
            ids.
        ImportError: If the tokenizer needs tensorflow-text and it is not installed.
    """

    def __init__(self, front_end):
        super().__init__()
        require_tensorflow_text(front_end.tokenizer)
        self.tokenizer = without_cache(front_end.tokenizer)
        self.size = front_end.size
        self.start, self.end = front_end.start_id, front_end.end_id
        self.unknown = front_end.unknown_id
        self.padding = getattr(front_end.tokenizer, "pad_token_id", None) or 0
        known = vocabulary_of(front_end.tokenizer)
        self.pads = any(known.get(piece) == self.padding for piece in PADDING)
        self.detokenizer = front_end.detokenize or detokenizer_of(self.tokenizer)
        # Read outside any graph: in a graph, the size of a table is a tensor.
        self._known = sorted(known.values())
        self._require_operations(front_end.tokenizer)

    def _require_operations(self, tokenizer):
        kind = type(tokenizer).__name__
        ids = tf.function(self.ids, autograph=False)
        try:
            graph = ids.get_concrete_function(tf.TensorSpec([None], tf.string)).graph
        except _NotIds:
            raise
        except Exception as error:  # Python code may raise any error
            raise ValueError(
                "`tokenizer` must be made of TensorFlow operations, to run in an "
                f"exported graph. Received: tokenizer={kind}, which fails with: {error}"
            ) from error
        definition = graph.as_graph_def()
        names = {node.op for node in definition.node}
        for function in definition.library.function:
            names.update(node.op for node in function.node_def)
        bad = sorted(n for n in names if "PyFunc" in n or n.startswith(CHANGES_TABLES))
        if bad:
            raise ValueError(
                "`tokenizer` must not run Python or change tables in the graph. "
                f"Received: tokenizer={kind}, with the operations {bad}"
            )

    def ids(self, text):
        """Converts strings (B,) to ragged int32 ids (B, T)."""
        text = self.utf8(text)
        # Adds a row, because `ByteTokenizer` fails on a batch without tokens.
        ids = self.tokenizer(tf.concat([text, ["a"]], axis=0))
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", tf.string)
        if shape is None or shape.rank != 2 or not dtype.is_integer:
            raise _NotIds(
                "`tokenizer` must return integer ids of shape (B, T). Received: "
                f"tokenizer={type(self.tokenizer).__name__}, which returned {ids}"
            )
        ids = ids[:-1]
        if not isinstance(ids, tf.RaggedTensor):
            self.pads = True
            real = tf.cast(ids != self.padding, tf.int64)
            ends = real * tf.range(1, tf.shape(ids, tf.int64)[1] + 1)
            lengths = tf.reduce_max(tf.pad(ends, [[0, 0], [1, 0]]), axis=1)
            ids = tf.RaggedTensor.from_tensor(ids, lengths=lengths)
        ids = tf.cast(ids, tf.int32)
        if self.size is None:
            return ids
        known = (ids.flat_values >= 0) & (ids.flat_values < self.size)
        if self.unknown is None:
            return tf.ragged.boolean_mask(ids, ids.with_flat_values(known))
        return ids.with_flat_values(tf.where(known, ids.flat_values, self.unknown))

    def text(self, ids):
        """Converts ragged int32 ids (B, T) to strings (B,)."""
        return self.utf8(self.detokenizer(ids))

    def utf8(self, text):
        """Replaces invalid UTF-8 in strings by U+FFFD."""
        return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")

    def pieces(self, ids):
        """Converts each of ragged int32 ids (B, T) to a string: ragged (B, T)."""
        alone = tf.RaggedTensor.from_tensor(ids.flat_values[:, None])
        return ids.with_flat_values(self.text(alone))

    def after_start(self, ids):
        """Puts the start token before ragged ids (B, T): returns dense (B, 1 + T)."""
        start = tf.fill([ids.nrows(), 1], tf.constant(self.start, tf.int32))
        return tf.concat([start, ids.to_tensor()], axis=1)

    def never(self):
        """Returns a boolean array (V,): true for ids that must not be generated."""
        never = np.zeros([self.size], bool)
        if self._known:
            never[:] = True
            never[[i for i in self._known if i < self.size]] = False
        never[self.start] = True
        if self.pads:
            never[self.padding] = True
        if self.unknown is not None:
            never[self.unknown] = True
        if self.end is not None:
            never[self.end] = False
        return never


class _NotIds(ValueError):
    pass
