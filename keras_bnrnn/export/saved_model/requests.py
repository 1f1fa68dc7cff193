"""Makes warm-up requests for the signatures of `export_saved_model`."""

import numpy as np

from keras_bnrnn.export.examples import shortest_timesteps
from keras_bnrnn.export.names import LENGTHS, TIME


def example_requests(served, functions, xla_buckets):
    """Makes one small warm-up request for each signature of `export_saved_model`.

    Args:
        served: `ServedModel`.
        functions: Dict from the name of each signature to its function.
        xla_buckets: List of `(B, T)`. The last requests are one `serve_xla` request
            for each bucket.

    Returns:
        List of `(signature_name, inputs)`, where `inputs` is a dict of arrays.
    """
    rng = np.random.default_rng(0)
    interface = served.interface
    rows = interface.batch_size or 1
    timesteps = shortest_timesteps(served.model, interface) + 7

    def whole(rows, timesteps, lengths=True):
        inputs = served.example_inputs(rows, timesteps, rng)
        if lengths:
            inputs[LENGTHS] = np.full([rows], timesteps, "int32")
        return inputs

    requests = [("serving_default", whole(rows, timesteps, served.takes_lengths))]
    states = {name: x.numpy() for name, x in served.states(rows).items()}
    states[TIME] = np.zeros([rows], "int32")
    first = interface.sequences[0]
    frames = served.example_inputs(rows, 1, rng)
    frame = {n: x[:, 0] if n in interface.sequences else x for n, x in frames.items()}
    streaming = {
        "step": {**frame, **states},
        "chunk": {**whole(rows, timesteps), **states},
        "initial_state": {first: frame[first]},
    }
    requests += [(name, x) for name, x in streaming.items() if name in functions]
    if "text" in functions:
        requests.append(("text", {"text": np.array([b"a b c"], object)}))
    if "generate" in functions:
        asked = {
            "prompt": np.array([b"a b c"], object),
            "max_tokens": np.array([2], "int32"),
            "temperature": np.array([1.0], "float32"),
            "seed": np.array([1], "int32"),
        }
        requests.append(("generate", asked))
    requests += [("serve_xla", whole(*bucket)) for bucket in xla_buckets]
    return [
        (name, {key: np.asarray(x) for key, x in inputs.items()})
        for name, inputs in requests
    ]
