"""Typical calls of the public API, for `mypy --strict`. Nothing runs this file.

Each line that ends with `# type: ignore[...]` is a mistake that the types find: mypy
fails if it does not.
"""

import pathlib
from typing import Any, assert_type

import keras
import numpy as np
from keras_bnrnn_client import ServingClient, StreamingSession

import keras_bnrnn.layers
from keras_bnrnn import (
    BNGRU,
    BNLSTM,
    BNGRUCell,
    BNLSTMCell,
    BNSimpleRNN,
    BNSimpleRNNCell,
    NormalizationMonitor,
    Recalibrate,
    SequenceBatchNorm,
    export_saved_model,
    fold,
    from_torch,
    normalize_model,
    recalibrate,
    types,
)
from keras_bnrnn.export import (
    ExportMismatchError,
    TextFrontEnd,
    VersionExistsError,
    export_litert,
    export_onnx,
)
from keras_bnrnn.folding import FoldedLayer
from keras_bnrnn.local_server import ModelServer
from keras_bnrnn.normalizing import NormalizedLayer
from keras_bnrnn.plots import plot_normalization, plot_recalibration
from keras_bnrnn_cli import main


def build() -> Any:
    model = keras.Sequential([keras.Input((None, 3), name="features")])
    model.add(BNLSTM(32, return_sequences=True, statistics="frame", momentum=0.9))
    model.add(BNLSTM(32, "relu", recurrent_dropout=0.1, peephole=True, seed=1))
    model.add(BNLSTM(32, use_cudnn=False, kernel_regularizer=keras.regularizers.L2()))
    model.add(BNGRU(np.int64(32).item(), reset_after=False, dtype="mixed_float16"))
    model.add(BNSimpleRNN(8, stateful=True, normalize="joint", name="top"))
    model.add(keras.layers.RNN(BNLSTMCell(8, activation=keras.activations.tanh)))
    cells = [BNGRUCell(8, gamma_initializer="ones"), BNSimpleRNNCell(8, seed=2)]
    model.add(keras.layers.RNN(cells, return_state=True))
    model.add(SequenceBatchNorm(epsilon=1e-5, center=False, name="norm"))
    return model


def mistakes() -> None:
    BNLSTM("32")  # type: ignore[arg-type]
    BNLSTM(32, statistics="frames")  # type: ignore[arg-type]
    BNGRU(32, normalise="joint")  # type: ignore[call-arg]
    BNSimpleRNNCell(32, use_bias=None)  # type: ignore[arg-type]
    SequenceBatchNorm(population="timestep")  # type: ignore[arg-type]
    export_saved_model(build(), "m", quantize="int8")  # type: ignore[arg-type]
    NormalizationMonitor(np.ones((2, 3, 4)), margin="5 %")  # type: ignore[arg-type]
    ModelServer({"m": "m"}, versions="newest")  # type: ignore[arg-type]
    keras_bnrnn.export_onyx  # type: ignore[attr-defined]  # noqa: B018


def finish(model: Any, frames: np.ndarray) -> pathlib.Path:
    changes = recalibrate(model, frames, steps=None, batch_size=16, verbose=0)
    assert_type(changes, dict[str, dict[str, float]])
    layer = BNLSTM(4)
    assert_type(layer.input_norm, SequenceBatchNorm)
    assert_type(layer.nonfinite_batches, int)
    assert_type(layer.get_config(), dict[str, Any])
    assert_type(BNLSTM.from_config(layer.get_config()), BNLSTM)
    stock = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(2)])
    assert_type(from_torch({}, [stock]), list[keras.Model])
    recalibrating = Recalibrate(frames, steps=2, every=1)
    monitor = NormalizationMonitor((frames, frames), pathlib.Path("logs"), margin=0.1)
    assert_type(monitor.history, dict[int, dict[str, dict[str, float]]])
    assert_type(monitor.unmeasured, dict[str, str])
    normalize_model(stock, frames, epsilon=1e-4).fit(
        frames, callbacks=[monitor, recalibrating]
    )
    plot_recalibration(recalibrating).savefig("changes.png")
    plot_normalization(monitor).savefig("normalization.png")
    normalized, normalizing = normalize_model(stock, frames, return_report=True)
    assert_type(normalizing, list[NormalizedLayer])
    normalized.summary()
    folded, report = fold(model, return_report=True)
    assert_type(report, list[FoldedLayer])
    assert_type(report[0].kept_because, str | None)
    fold(fold(model)).predict(frames)
    front_end = TextFrontEnd(str.split, end_token="<eos>", max_tokens=50)
    assert_type(front_end.start_id, int | None)
    try:
        path = export_saved_model(
            folded,
            pathlib.Path("models"),
            lengths=True,
            text_front_end=front_end,
            warmup=[{"features": frames[:1], "lengths": [3]}],
            xla_buckets=[(1, 64), (32, 64)],
            provenance={"data": "2026-11"},
        )
    except (ExportMismatchError, VersionExistsError):
        path = export_saved_model(folded, "models", 2, warmup=None, streaming=False)
    assert_type(path, pathlib.Path)
    assert_type(export_litert(folded, "m.tflite", fused_lstm=False), pathlib.Path)
    return export_onnx(folded, path / "m.onnx", tolerance=1e-3, overwrite=True)


def serve(frames: np.ndarray) -> int:
    server = ModelServer({"speech": "models"}, port=0, grpc_port=None, versions=2)
    with server as started, ServingClient("speech", rest_url=started.url) as client:
        assert_type(started, ModelServer)
        outputs = client.predict({"features": frames, "lengths": [40]})
        assert_type(outputs, dict[str, np.ndarray])
        assert_type(client.session(), StreamingSession)
    return main(["inspect", "models", "--json"])


class Cell(keras_bnrnn.layers.BNCell, keras.layers.SimpleRNNCell):
    """A cell of a new kind."""

    gates = 1
    more_weights = ("scale",)
    gate_activations = (("h", "activation"),)

    def step(
        self,
        projected: types.Tensor,
        recurrent: types.Tensor,
        states: list[types.Tensor],
        weights: Any,
        norm: types.Norm,
    ) -> list[types.Tensor]:
        return [self.activation(norm("joint", projected + recurrent, slice(0, 4)))]


class Layer(keras_bnrnn.layers.BNRNN):
    """A layer of the new cell."""

    cell_class = Cell

    def __init__(self, units: int, **arguments: Any) -> None:
        super().__init__(units=units, **arguments)
