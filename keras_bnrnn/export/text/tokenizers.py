"""Reads properties of tokenizers and adapts tokenizers to an exported graph."""

import sys

import keras
import tensorflow as tf


def own_size(tokenizer):
    """Returns the vocabulary size of a tokenizer, or `None` if it is not known."""
    size = getattr(tokenizer, "vocabulary_size", None)
    size = size() if callable(size) else size
    if is_byte_pair(tokenizer):
        return max(tokenizer.vocabulary.values()) + 1  # its ids may have gaps
    return None if size is None else int(size)


def vocabulary_of(tokenizer):
    """Returns a dict from token to id, empty if the tokenizer has no vocabulary."""
    if not hasattr(tokenizer, "get_vocabulary") or own_size(tokenizer) is None:
        return {}
    tokens = tokenizer.get_vocabulary()
    if isinstance(tokens, dict):
        return tokens
    if is_byte_pair(tokenizer):
        return tokenizer.vocabulary  # its ids may have any order
    return {token: i for i, token in enumerate(tokens)}


def require_tensorflow_text(tokenizer):
    """Raises ImportError if a KerasHub tokenizer needs missing tensorflow-text."""
    if not any(t.__module__.startswith("keras_hub") for t in type(tokenizer).__mro__):
        return
    try:
        import tensorflow_text  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`TextFrontEnd` with {type(tokenizer).__name__} needs tensorflow-text, "
            f"which cannot be imported: {error}. Install it with "
            "`pip install 'keras-bnrnn[text]'`."
        ) from error


def without_cache(tokenizer):
    """Copies a `BytePairTokenizer` without its cache; returns others unchanged."""
    if not is_byte_pair(tokenizer):
        return tokenizer
    copy = type(tokenizer).from_config(tokenizer.get_config())
    copy.set_vocabulary_and_merges(tokenizer.vocabulary, tokenizer.merges)
    copy.cache = _NoCache(copy.unsplittable_tokens or [])
    return copy


class _NoCache:
    """Replaces the cache of a `BytePairTokenizer`, which grows with each new word.

    The tokenizer looks up all words, inserts the missing words and looks up all words
    again. Here the second lookup returns the words just inserted and removes them.
    """

    def __init__(self, unsplittable):
        self._unsplittable = list(unsplittable)
        self._inserted = None

    def lookup(self, words):
        found = tf.zeros_like(words)
        if self._unsplittable:
            whole = words[:, None] == tf.constant(self._unsplittable)
            found = tf.where(tf.reduce_any(whole, axis=1), words, found)
        if self._inserted is not None:
            found = tf.tensor_scatter_nd_update(
                found, tf.where(found == ""), self._inserted
            )
            self._inserted = None
        found.set_shape([None])
        return found

    def insert(self, words, pieces):
        self._inserted = pieces


def detokenizer_of(tokenizer):
    """Returns a tokenizer's function from ids to text, or `None` if it has none."""
    if isinstance(tokenizer, keras.layers.TextVectorization):
        words = tokenizer.get_vocabulary()
        separator = "" if tokenizer.get_config()["split"] == "character" else " "

        def join_words(ids):
            known = ids.with_flat_values(tf.gather(words, ids.flat_values))
            return tf.strings.reduce_join(known, axis=-1, separator=separator)

        return join_words

    keras_hub = sys.modules.get("keras_hub")
    if keras_hub and isinstance(tokenizer, keras_hub.tokenizers.ByteTokenizer):
        # `ByteTokenizer.detokenize` keeps a tensor of the graph of its first call.
        characters = [bytes([i]) for i in range(256)]

        def join_bytes(ids):
            known = tf.ragged.boolean_mask(ids, ids > 0)
            known = known.with_flat_values(tf.gather(characters, known.flat_values))
            return tf.strings.reduce_join(known, axis=-1)

        return join_bytes
    return getattr(tokenizer, "detokenize", None)


def is_byte_pair(tokenizer):
    keras_hub = sys.modules.get("keras_hub")  # not imported: no KerasHub tokenizer
    return keras_hub is not None and isinstance(
        tokenizer, keras_hub.tokenizers.BytePairTokenizer
    )
