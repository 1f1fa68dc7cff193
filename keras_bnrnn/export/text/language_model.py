"""Scores texts and generates texts with a language model."""

import numpy as np
import tensorflow as tf

from keras_bnrnn.export.shapes import require_shapes


class LanguageModel:
    """Computes the logits of the next token with a `ServedModel`."""

    def __init__(self, served, output, logits):
        ((self._input, x),) = served.interface.inputs.items()
        self._dtype = x.dtype
        self._served, self._output, self._logits = served, output, logits
        self.states = served.states

    def predict(self, ids, lengths):
        """Returns the logits (B, T, V) of the token after each of ids (B, T)."""
        return self._from(self._served.predict(self._inputs(ids), lengths))

    def advance(self, ids, lengths, states):
        """Returns the logits (B, T, V) after each of the next ids (B, T), and states.

        Args:
            ids: Integer tensor (B, T).
            lengths: int32 tensor (B,), or `None` if all ids are valid.
            states: Dict of the states before these ids.
        """
        outputs, states = self._served.advance(self._inputs(ids), lengths, states)
        return self._from(outputs), states

    def _inputs(self, ids):
        return {self._input: tf.cast(ids, self._dtype)}

    def _from(self, outputs):
        y = outputs[self._output]
        # Probabilities below the smallest normal float32 count as this number: JSON
        # cannot represent the infinite logarithm of 0.
        return y if self._logits else tf.math.log(tf.maximum(y, 1.2e-38))


class Scorer(tf.Module):
    """The signature `text` of a language model: scores each token of a text."""

    def __init__(self, model, codec):
        super().__init__()
        self._model, self.codec = model, codec

    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="text")]
    )
    def __call__(self, text):
        text = require_shapes({"text": text}, {"text": ["B"]})["text"]
        ids = self.codec.ids(text)
        targets = ids.to_tensor()  # (B, T)
        timesteps = tf.shape(targets)[1]
        lengths = tf.cast(ids.row_lengths(), tf.int32)

        before = self.codec.after_start(ids)[:, : tf.maximum(timesteps, 1)]
        logits = self._model.predict(before, lengths)[:, :timesteps]  # (B, T, V)
        chosen = tf.gather(logits, targets, batch_dims=2)
        log_p = chosen - tf.reduce_logsumexp(logits, axis=-1)
        log_p = tf.where(tf.sequence_mask(lengths, timesteps), log_p, 0.0)
        mean = tf.reduce_sum(log_p, 1) / tf.cast(tf.maximum(lengths, 1), tf.float32)
        return {
            "tokens": self.codec.pieces(ids).to_tensor(),
            "log_probabilities": log_p,
            "lengths": lengths,
            "perplexity": tf.exp(-mean),
        }


class Generator(tf.Module):
    """The signature `generate`: continues prompts, one model step per new token."""

    def __init__(self, model, codec, most):
        super().__init__()
        self._model, self.codec, self._most = model, codec, most

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None], tf.string, name="prompt"),
            tf.TensorSpec([None], tf.int32, name="max_tokens"),
            tf.TensorSpec([None], tf.float32, name="temperature"),
            tf.TensorSpec([None], tf.int32, name="seed"),
        ],
    )
    def __call__(self, prompt, max_tokens, temperature, seed):
        given = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        given = require_shapes(given, {name: ["B"] for name in given})
        prompt, max_tokens, temperature, seed = given.values()
        max_tokens = tf.clip_by_value(max_tokens, 0, self._most)
        # `temperature > 0` is false for NaN. An infinite temperature would turn logits
        # of -inf into NaN.
        temperature = tf.where(temperature > 0, tf.minimum(temperature, 1e9), 0.0)

        ids = self.codec.ids(prompt)
        new = self._new_ids(ids, max_tokens, temperature, self._random_numbers(seed))
        head = self.codec.text(ids)
        whole = self.codec.text(tf.concat([ids, new], axis=1))
        return {"text": _continued(self.codec.utf8(prompt), head, whole)}

    def _new_ids(self, ids, max_tokens, temperature, numbers):
        """Generates ragged ids (B, N) that continue ragged ids (B, T)."""
        read = self.codec.after_start(ids)  # (B, 1 + T)
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        # The first step of the loop reads the last id.
        last = tf.gather(read, lengths, batch_dims=1)
        read = read[:, : tf.maximum(tf.shape(read)[1] - 1, 1)]
        states = self._model.states(tf.shape(read)[0])
        _, states = self._model.advance(read, lengths, states)
        most = tf.reduce_max(tf.pad(max_tokens, [[1, 0]]))

        def goes_on(i, last, ended, new, count, states):
            return (i < most) & ~tf.reduce_all(ended)

        def step(i, last, ended, new, count, states):
            logits, states = self._model.advance(last[:, None], None, states)
            last = self._choose(logits[:, 0], temperature, numbers[:, i])
            if self.codec.end is not None:
                ended |= last == self.codec.end
            here = (tf.range(most) == i) & ~ended[:, None]
            new = tf.where(here, last[:, None], new)
            count += tf.cast(~ended, tf.int64)
            return i + 1, last, ended | (i + 1 >= max_tokens), new, count, states

        new = tf.zeros([tf.shape(read)[0], most], tf.int32)
        count = tf.zeros_like(lengths, tf.int64)
        loop = [0, last, max_tokens < 1, new, count, states]
        *_, new, count, _ = tf.while_loop(
            goes_on, step, loop, tf.nest.map_structure(_any_batch_size, loop)
        )
        return tf.RaggedTensor.from_tensor(new, lengths=count)

    def _random_numbers(self, seed):
        """Draws numbers (B, max tokens) in [0, 1), each row from its own seed.

        The number of columns is constant, so that the numbers of a row do not depend on
        the `max_tokens` of the batch.
        """

        def of_row(seed):
            return tf.random.stateless_uniform(
                [self._most], tf.stack([seed, 0]), dtype=tf.float64, alg="philox"
            )

        spec = tf.TensorSpec([self._most], tf.float64)
        return tf.map_fn(of_row, seed, fn_output_signature=spec)

    def _choose(self, logits, temperature, number):
        """Chooses tokens (B,) for logits (B, V).

        With a temperature above 0, the token is the first whose cumulative probability
        exceeds the random number; otherwise it is the most likely token.
        """
        never = self.codec.never()
        logits = tf.where(never, -np.inf, logits)
        likeliest = tf.argmax(logits, axis=1, output_type=tf.int32)
        logits -= tf.reduce_max(logits, axis=1, keepdims=True)
        divisor = tf.where(temperature > 0, temperature, 1.0)[:, None]
        chances = tf.exp(logits / divisor)
        # float64: with a vocabulary of 100,000, float32 sums are too inexact.
        sums = tf.cumsum(tf.cast(chances, tf.float64), axis=1)
        over = (sums > number[:, None] * sums[:, -1:]) & (chances > 0)
        drawn = tf.argmax(tf.cast(over, tf.int32), axis=1, output_type=tf.int32)
        return tf.where(temperature > 0, drawn, likeliest)


def _any_batch_size(x):
    shape = tf.convert_to_tensor(x).shape
    return tf.TensorShape([None] * min(shape.rank, 1)).concatenate(shape[1:])


def _continued(prompt, head, whole):
    """Appends generated text to the unchanged prompts.

    Args:
        prompt: Strings (B,).
        head: Strings (B,), the prompts converted to ids and back. They may differ from
            `prompt`, for example in case or by marks for unknown words.
        whole: Strings (B,), the ids of the prompts and the generated ids as text.
    """
    size = tf.minimum(tf.strings.length(head), tf.strings.length(whole))
    tail = tf.strings.substr(whole, size, tf.strings.length(whole))
    # If the tokenizer drops the space at the end of the prompt, the generated text
    # starts with a space: avoid a double space.
    doubled = tf.strings.regex_full_match(tail, r"(?s) .*")
    doubled &= ~tf.strings.regex_full_match(head, r"(?s).*\s")
    start = tf.where(doubled, tf.strings.regex_replace(prompt, r"\s+$", ""), prompt)
    begins = tf.strings.substr(whole, tf.zeros_like(size), size) == head
    return tf.where(begins, tf.strings.join([start, tail]), whole)
