"""Measures one contender in a fresh process, and prints the result as JSON.

Memory: bytes that the process holds at its peak, with and without what it held before
the model was made. Compile: seconds of the first step, less those of a later one. First
fit: the same of the first and a later `fit` of 16 batches.
"""

import argparse
import json
import pathlib
import time

import contenders


def resident(field):
    """Bytes of `VmRSS` or `VmHWM` of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def memory(step, before):
    """The peak of tracing, compiling and a few steps, over what was held before."""
    for _ in range(5):
        step()
    peak = resident("VmHWM")
    return {"bytes": peak - before, "process_bytes": peak}


def compile_time(step, before):
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    start = time.perf_counter()
    step()
    return {"seconds": first - (time.perf_counter() - start)}


def first_fit(name, shape, kind):
    epoch = contenders.fitted(name, shape, kind, "auto")

    def seconds():
        start = time.perf_counter()
        epoch()
        return time.perf_counter() - start

    first = seconds()
    return {"seconds": first - seconds()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=["memory", "compile", "first fit"])
    parser.add_argument("name")
    parser.add_argument("mode", choices=contenders.MODES)
    parser.add_argument("shape", type=int, nargs=4)
    parser.add_argument("--kind", default="lstm", help="of the layer of a first fit")
    arguments = parser.parse_args()

    shape = tuple(arguments.shape)
    # What TensorFlow sets up once in a process is nobody's.
    warm = (2, 3, 4, 5)
    contenders.training_step(
        contenders.model("keras", warm), contenders.frames(warm), arguments.mode
    )()
    if arguments.measure == "first fit":
        print(json.dumps(first_fit(arguments.name, shape, arguments.kind)))
        return
    before = resident("VmRSS")
    step = contenders.training_step(
        contenders.model(arguments.name, shape, mode=arguments.mode),
        contenders.frames(shape),
        arguments.mode,
    )
    measure = memory if arguments.measure == "memory" else compile_time
    print(json.dumps(measure(step, before)))


if __name__ == "__main__":
    main()
