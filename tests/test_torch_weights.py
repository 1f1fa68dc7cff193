"""`from_torch`: the weights of PyTorch's recurrent modules in Keras layers.

The oracle computes the equations of PyTorch's documentation in NumPy, in float64. Where
PyTorch is installed, the modules themselves are compared, too.
"""

import keras
import numpy as np
import pytest
from helpers import gap
from keras import layers

import keras_bnrnn
from keras_bnrnn import from_torch, normalize_model

B, T, D, H = 4, 6, 3, 5
STOCK = {"LSTM": layers.LSTM, "GRU": layers.GRU, "RNN": layers.SimpleRNN}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
EACH = pytest.mark.parametrize("kind", STOCK)


def sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))


def torch_step(kind, x, h, c, w, nonlinearity):
    """One timestep, by the equations of torch.nn.LSTM, GRU and RNN."""
    of_x = x @ w["weight_ih"].T + w["bias_ih"]
    of_h = h @ w["weight_hh"].T + w["bias_hh"]
    if kind == "RNN":
        return nonlinearity(of_x + of_h), c
    if kind == "GRU":
        x_r, x_z, x_n = np.split(of_x, 3, axis=-1)
        h_r, h_z, h_n = np.split(of_h, 3, axis=-1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = np.tanh(x_n + r * h_n)
        return (1 - z) * n + z * h, c
    i, f, g, o = np.split(of_x + of_h, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def torch_module(kind, x, state_dict, depth, directions, nonlinearity=np.tanh):
    """Outputs (B, T, directions * H) of the last layer, batch first."""
    for layer in range(depth):
        outputs = []
        for direction in range(directions):
            end = f"_l{layer}" + "_reverse" * direction
            w = {
                role: state_dict.get(role + end, 0.0)
                for role in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            h = c = np.zeros((len(x), H))
            steps = range(T)[:: -1 if direction else 1]
            out = np.zeros((len(x), T, H))
            for t in steps:
                h, c = torch_step(kind, x[:, t], h, c, w, nonlinearity)
                out[:, t] = h
            outputs.append(out)
        x = np.concatenate(outputs, axis=-1)
    return x


def random_state(kind, rng, depth=1, directions=1, bias=True, prefix=""):
    state_dict = {}
    for layer in range(depth):
        features = directions * H if layer else D
        for direction in range(directions):
            end = f"_l{layer}" + "_reverse" * direction
            rows = GATES[kind] * H
            state_dict[f"{prefix}weight_ih{end}"] = rng.normal(size=(rows, features))
            state_dict[f"{prefix}weight_hh{end}"] = rng.normal(size=(rows, H))
            if bias:
                state_dict[f"{prefix}bias_ih{end}"] = rng.normal(size=rows)
                state_dict[f"{prefix}bias_hh{end}"] = rng.normal(size=rows)
    return {name: 0.5 * value for name, value in state_dict.items()}


def stack(kind, depth=1, directions=1, **arguments):
    arguments = {"return_sequences": True, **arguments}
    parts = [STOCK[kind](H, **arguments) for _ in range(depth)]
    if directions == 2:
        parts = [layers.Bidirectional(part) for part in parts]
    return parts


def model_of(parts):
    return keras.Sequential([keras.Input((None, D)), *parts])


# Float32 recurrences of a few layers against float64: 1e-5.
CLOSE = 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@EACH
def test_every_kind(kind, directions, bias, rng):
    state_dict = random_state(kind, rng, 2, directions, bias)
    x = rng.normal(size=(B, T, D)).astype("float32")
    expected = torch_module(kind, x, state_dict, 2, directions)
    model = model_of([layers.Dropout(0.5), *stack(kind, 2, directions)])
    assert from_torch(state_dict, model) is model
    assert gap(model(x), expected) <= CLOSE
    without_bias = stack(kind, 2, directions, use_bias=bias)
    parts = from_torch(state_dict, without_bias)  # not built yet
    assert parts is without_bias
    assert gap(model_of(parts)(x), expected) <= CLOSE


@EACH
def test_float64(kind, rng, float64):
    state_dict = random_state(kind, rng, 2, 2)
    x = rng.normal(size=(B, T, D))
    model = model_of(from_torch(state_dict, stack(kind, 2, 2)))
    assert gap(model(x), torch_module(kind, x, state_dict, 2, 2)) <= 1e-12


def test_relu(rng):
    state_dict = random_state("RNN", rng)
    x = rng.normal(size=(B, T, D)).astype("float32")
    model = model_of(from_torch(state_dict, stack("RNN", activation="relu")))
    relu = torch_module("RNN", x, state_dict, 1, 1, lambda a: np.maximum(a, 0.0))
    assert gap(model(x), relu) <= CLOSE * np.max(relu)


def test_cells_nested_models_and_shared_layers(rng):
    state_dict = random_state("LSTM", rng, 3, prefix="encoder.lstm.")
    state_dict["decoder.weight"] = rng.normal(size=(2, 2))
    x = rng.normal(size=(B, T, D)).astype("float32")
    cells = [layers.LSTMCell(H), layers.LSTMCell(H)]
    inner = keras.Sequential(
        [keras.Input((None, H)), layers.RNN(cells, return_sequences=True)]
    )
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, inner(stack("LSTM")[0](inputs)))
    from_torch(state_dict, [model, inner], prefix="encoder.lstm.")  # inner: once
    short = {name.removeprefix("encoder.lstm."): v for name, v in state_dict.items()}
    assert gap(model(x), torch_module("LSTM", x, short, 3, 1)) <= CLOSE


def test_directions_in_another_order(rng):
    state_dict = random_state("GRU", rng, directions=2)
    x = rng.normal(size=(B, T, D)).astype("float32")
    (part,) = stack("GRU", go_backwards=True)
    (other,) = stack("GRU")
    model = model_of([layers.Bidirectional(part, backward_layer=other)])
    from_torch(state_dict, model)
    a, b = model.layers[0].forward_layer, model.layers[0].backward_layer
    expected = torch_module("GRU", x, state_dict, 1, 2)
    assert gap(keras.ops.flip(a(x), axis=1), expected[..., H:]) <= CLOSE
    assert gap(b(x), expected[..., :H]) <= CLOSE


class Tensor:
    """What a parameter on another device offers."""

    def __init__(self, value):
        self.value = value

    def detach(self):
        return Tensor(self.value)

    cpu = detach

    def numpy(self):
        return self.value


def test_tensors(rng):
    arrays = random_state("LSTM", rng)
    tensors = {name: Tensor(value) for name, value in arrays.items()}
    (a,), (b,) = (from_torch(s, stack("LSTM")) for s in (arrays, tensors))
    for one, other in zip(a.weights, b.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_on_to_normalised_layers(rng):
    state_dict = random_state("LSTM", rng, 2, 2)
    x = rng.normal(size=(B, T, D)).astype("float32")
    model = from_torch(state_dict, model_of(stack("LSTM", 2, 2)))
    normalized = normalize_model(model, x, verbose=0)
    assert type(normalized.layers[0].forward_layer) is keras_bnrnn.BNLSTM
    assert gap(normalized(x), torch_module("LSTM", x, state_dict, 2, 2)) <= CLOSE


def refusal(state_dict, parts, match, **arguments):
    before = [np.asarray(w).copy() for part in parts for w in part.weights]
    with pytest.raises(ValueError, match=match):
        from_torch(state_dict, parts, **arguments)
    after = [w for part in parts for w in part.weights]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refused_state_dicts(rng):
    good = random_state("LSTM", rng, 2)
    parts = stack("LSTM", 2)
    projected = {**good, "weight_hr_l0": np.ones((2, H))}
    refusal(projected, parts, "proj_size.*weight_hr_l0")
    prefixed = {f"a.{name}": value for name, value in good.items()} | {"b": 1}
    refusal(prefixed, parts, r"Pass prefix='a\.'.*Received: 'a\.weight_ih_l0'")
    refusal(prefixed, parts, r"Pass prefix='a\.'.*prefix='c'", prefix="c")
    refusal({"b": 1}, parts, "no name that ends with weight_ih_l0.*'b'")
    for missing in ("weight_hh_l1", "bias_hh_l0", "weight_ih_l0"):
        partial = {name: v for name, v in good.items() if name != missing}
        refusal(partial, parts, f"no '{missing}'")
    one_direction = {**good, "weight_ih_l0_reverse": good["weight_ih_l0"]}
    refusal(one_direction, parts, "no 'weight_hh_l0_reverse'")


def test_refused_layers(rng):
    good = random_state("LSTM", rng, 2)
    built = stack("LSTM", 2)
    model_of(built)
    refusal(good, built[:1], r"Received: layers=\['lstm.*'\] for 2 layers")
    refusal(good, [layers.Dense(2)], r"Received: layers=\[\] for 2 layers")
    refusal(good, stack("LSTM", 2, 2), "of one direction.*'bidirectional")
    two = random_state("LSTM", rng, 2, 2)
    refusal(two, stack("LSTM", 2), "in `keras.layers.Bidirectional`.*'lstm")
    refusal(good, stack("GRU", 2), "takes the weights of torch.nn.GRU.*torch.nn.LSTM")
    # The first layer fits, the second one does not.
    unequal = [built[0], layers.LSTM(H + 1)]
    refusal(good, unequal, "5 units of 5 input features.*of 6 units")
    wider = layers.LSTM(H)
    wider.build((None, None, D + 1))
    first = random_state("LSTM", rng)
    refusal(first, [wider], "5 units of 3 input.*5 units and 4 features")
    refusal(first, stack("LSTM", use_bias=False), "bias.*use_bias=False")
    refusal(first, stack("LSTM", go_backwards=True), "go_backwards=True")
    refusal(first, stack("LSTM", activation="relu"), "tanh.*activation=relu")
    refusal(first, stack("LSTM", recurrent_activation="hard_sigmoid"), "sigmoid")
    refusal(random_state("RNN", rng), stack("RNN", activation="elu"), "tanh or relu")
    refusal(
        random_state("GRU", rng), stack("GRU", reset_after=False), "reset_after=False"
    )
    refusal(first, [keras_bnrnn.BNLSTM(H)], "normalize_model.*BNLSTMCell")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@EACH
def test_torch_itself(kind, bidirectional, bias, rng):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    options = {"bidirectional": bidirectional, "bias": bias, "batch_first": True}
    module = getattr(torch.nn, kind)(D, H, num_layers=2, **options)
    x = rng.normal(size=(B, T, D)).astype("float32")
    with torch.no_grad():
        expected, _ = module(torch.from_numpy(x))
    state_dict = {name: v.numpy() for name, v in module.state_dict().items()}
    oracle = torch_module(kind, x, state_dict, 2, 1 + bidirectional)
    assert gap(expected.numpy(), oracle) <= CLOSE

    parameters = dict(module.named_parameters())  # these require a gradient
    for tensors in (module.state_dict(), parameters):
        parts = from_torch(tensors, stack(kind, 2, 1 + bidirectional))
        assert gap(model_of(parts)(x), expected.numpy()) <= CLOSE
    half = {name: v.to(torch.bfloat16) for name, v in module.state_dict().items()}
    rounded = from_torch(half, stack(kind, 2, 1 + bidirectional))
    # bfloat16 has 8 bits.
    assert gap(model_of(rounded)(x), expected.numpy()) <= 0.05


def test_proj_size_of_torch_itself():
    torch = pytest.importorskip("torch")
    module = torch.nn.LSTM(D, H, proj_size=2)
    refusal(module.state_dict(), stack("LSTM"), "proj_size")
