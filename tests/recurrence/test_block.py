"""The operations for whole sequences, against the loop of an LSTM defined here."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import gap

from keras_bnrnn import backend
from keras_bnrnn.recurrence import (
    Loop,
    Schedule,
    StepDerivative,
    Weights,
    block,
    forward,
    schedule,
    time_loop,
)

T, B, D, U = 4, 3, 2, 5


def step(projected, recurrent, states, weights, valid):
    i, f, c, o = tf.split(projected + recurrent, 4, axis=-1)
    new_c = tf.sigmoid(f) * states[1] + tf.sigmoid(i) * tf.tanh(c)
    return [tf.sigmoid(o) * tf.tanh(new_c), new_c], []


class Block(StepDerivative):
    """Names the operations; they contain the closed forms."""

    def block_of(self, weights):
        return "lstm"


LOOP = Loop(
    step, lambda w: w.recurrent_kernel, bounded=True, schedule=Schedule(by_step=True)
)


def arguments(rng, has_bias=True):
    """Frames, states and weights, float32."""

    def draw(*shape):
        return tf.constant(rng.normal(size=shape), "float32")

    bias = draw(4 * U) if has_bias else None
    weights = Weights(draw(D, 4 * U), draw(U, 4 * U), bias)
    return draw(T, B, D), [draw(B, U), draw(B, U)], weights


def as_it_is(function):
    return function


def in_graph(function, *tensors):
    return tf.function(function, autograph=False)(*tensors)


@pytest.mark.parametrize(
    "wants_last, stacks, has_bias",
    [(True, 0, True), (True, 1, False), (False, 2, True), (False, 1, True)],
)
def test_outputs_and_gradients(wants_last, stacks, has_bias, rng):
    """Float32: 1e-5 of gradients that are sums of 12 rows of order 1."""
    frames, states, weights = arguments(rng, has_bias)
    bias = [weights.bias] if has_bias else []
    tensors = [frames, *states, weights.kernel, weights.recurrent_kernel, *bias]
    factors = [rng.normal(size=(T, B, U)) for _ in range(stacks)]
    factors += [rng.normal(size=(B, U)) for _ in range(2 * wants_last)]

    def run(by_block, frames, h, c, kernel, recurrent_kernel, bias=None):
        weights = Weights(kernel, recurrent_kernel, bias)
        if by_block:
            run = block.Block(stacks, wants_last, as_it_is)
            return run(LOOP, frames, [h, c], weights)
        frames, weights = forward.projected(frames, weights)
        sequences, last, _, _ = forward.run(LOOP, frames, [h, c], weights, stacks)
        return sequences, last if wants_last else []

    def results(by_block):
        def call(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                sequences, last = run(by_block, *tensors)
                assert len(sequences) == stacks and len(last) == 2 * wants_last
                found = [*sequences, *last]
                loss = sum(
                    tf.reduce_sum(result * factor)
                    for result, factor in zip(found, factors, strict=True)
                )
            return [*found, *tape.gradient(loss, tensors)]

        return in_graph(call, *tensors)

    for a, b in zip(results(True), results(False), strict=True):
        assert gap(a, b) <= 1e-5 * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("wants_last", [False, True])
def test_what_second_derivatives_differentiate(wants_last, rng, monkeypatch):
    """A plain loop, whose results are those of the operations."""
    given = LOOP, *arguments(rng)
    run = block.Block(2, wants_last, as_it_is)
    expected = in_graph(lambda: tf.nest.flatten(run(*given)))
    monkeypatch.setattr(backend, "custom_gradient", lambda plain, *_: plain)
    found = in_graph(lambda: tf.nest.flatten(run(*given)))
    assert len(found) == (4 if wants_last else 2)
    for a, b in zip(found, expected, strict=True):
        assert gap(a, b) <= 1e-6  # float32 of order 1


def test_blocks_of_the_backward_loop_have_the_frames_of_all_rows(rng, monkeypatch):
    rows = []
    monkeypatch.setattr(block, "timesteps_of_block", lambda n: rows.append(n) or 2)
    frames, states, weights = arguments(rng)

    def call(frames):
        with tf.GradientTape() as tape:
            tape.watch(frames)
            run = block.Block(1, False, as_it_is)
            sequences, _ = run(LOOP, frames, states, weights)
        return tape.gradient(sequences[0], frames)

    in_graph(call, frames)
    assert rows == [B, B]  # of the forward and of the backward loop


def test_when_the_operations_run(rng, monkeypatch):
    """If all of the conditions hold, and not if one of them does not."""
    monkeypatch.setattr(backend, "has_block", lambda name: name == "lstm")
    _, _, weights = arguments(rng)

    def runs(loop=LOOP, weights=weights, derivative=Block(), rows=B):  # noqa: B008
        return block.runs_as_block(loop, rows, weights, derivative)

    assert runs()
    other = LOOP._replace(schedule=Schedule(by_step=False))
    assert not runs(other)
    other = LOOP._replace(schedule=Schedule(by_step=True, keeps=False))
    assert not runs(other)
    assert not runs(LOOP._replace(bounded=False))
    assert not runs(weights=weights._replace(kernel=None))
    dropped = weights._replace(recurrent_dropout_mask=tf.ones((B, U)))
    assert not runs(weights=dropped)
    assert not runs(derivative=None)
    assert not runs(derivative=StepDerivative())
    weights_count = (D + U) * 4 * U
    monkeypatch.setattr(schedule, "BLOCK_WEIGHTS_WITH_ONEDNN", weights_count + 1)
    monkeypatch.setattr(schedule, "BLOCK_PRODUCT_WITH_ONEDNN", (B + 1) * weights_count)
    alongside = LOOP._replace(schedule=Schedule(by_step=True, has_company=True))
    for onednn in (False, True):
        monkeypatch.setattr(backend, "products_by_onednn", lambda on=onednn: on)
        assert runs() and runs(rows=tf.constant(B))
        assert runs(rows=B + 1) == (not onednn)
        assert runs(alongside) == runs(alongside, rows=tf.constant(B)) == (not onednn)
        assert runs(alongside, rows=B // 2)
    monkeypatch.setattr(schedule, "BLOCK_WEIGHTS_WITH_ONEDNN", weights_count)
    assert not runs(rows=B) and not runs(rows=tf.constant(B))
    assert runs(alongside, rows=B // 2)  # two directions need as many rows


def test_whether_tensorflow_uses_onednn():
    """A private function of TensorFlow says so; a product in a profile would too."""
    for value in ("0", "1"):
        code = "from keras_bnrnn import backend; print(backend.products_by_onednn())"
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": value},
            capture_output=True,
            text=True,
            check=True,
        )
        has_onednn = platform.machine() in ("x86_64", "AMD64")
        assert found.stdout.strip() == str(value == "1" and has_onednn)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_runs_them(masked, rng, monkeypatch):
    """The states at the end of each row are those of the loop: 1e-6 in float32."""
    monkeypatch.setattr("keras_bnrnn.recurrence.schedule.BY_STEP_FROM", 0)
    frames, states, weights = arguments(rng)
    lengths, valid = None, None
    if masked:
        lengths = tf.constant([T, 0, 2])
        valid = tf.range(T)[:, None, None] < lengths[None, :, None]
    found = []
    for derivative in (Block(), None):
        outputs, last, _ = in_graph(
            lambda derivative=derivative: time_loop(
                LOOP._replace(valid=valid),
                frames,
                states,
                weights,
                lengths,
                derivative=derivative,
            )
        )
        found.append([outputs if valid is None else tf.where(valid, outputs, 0), *last])
    for a, b in zip(*found, strict=True):
        assert gap(a, b) <= 1e-6
