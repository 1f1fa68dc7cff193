"""The runs behind docs/experiments.md: `make experiments`.

Each run is one of the examples with its arguments. A run that docs/experiments/ has
the log of, with the same arguments, is not made again; one that was interrupted goes
on where it was. The whole list takes some four hours on two cores: groups or runs can
be named, and each run has one core to itself, so that `cpu_seconds` compare.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import queue
import shlex
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import training

HERE = pathlib.Path(__file__).parent
LOGS = HERE.parents[1] / "docs" / "experiments"
PACKAGES = ("tensorflow", "keras", "keras-bnrnn")


@dataclasses.dataclass(frozen=True)
class Run:
    """A program of this folder with its arguments.

    Attributes:
        name: Of its log, docs/experiments/NAME.json.
        group: What it belongs to, such as "figure1".
        script: Name of the program, without .py.
        arguments: On its command line, less --output-dir and --data-dir.
        data: The folder in --data-dir that it reads; None: it needs none.
    """

    name: str
    group: str
    script: str
    arguments: tuple
    data: str | None = None

    @property
    def command(self):
        return shlex.join(["python", f"examples/paper/{self.script}.py", *self.arguments])


def runs():
    """All of them, in the order in which they are made."""
    return [
        *language_models(),
        *speech(),
        *grid(),
        *digits(),
    ]


def language_models():
    def model(size, normalize, *more, group="figure2", suffix=""):
        return Run(
            f"language_model-{size}-{normalize}{suffix}",
            group,
            "language_model",
            ("--size", size, "--normalize", normalize, "--no-export", *more),
            data="ptb",
        )

    yield from (model("small", normalize) for normalize in ("none", "input"))
    yield model("small", "joint", *("--epochs", "4"), group="joint")
    yield model(
        *("small", "input", "--statistics", "sequence", "--epochs", "2"),
        group="statistics",
        suffix="-sequence",
    )
    for normalize in ("none", "input"):
        yield model("medium", normalize, "--hours", "1")


SPEECH = ("--passes", "1", "--layers", "5", "--units", "32")


def speech():
    def run(group, normalize, seed, *more, suffix=""):
        return Run(
            f"speech-{normalize}{suffix}-{seed}",
            group,
            "speech_frames",
            (*SPEECH, "--normalize", normalize, "--seed", str(seed), *more),
            data="fsdd",
        )

    for seed in (1, 2, 3):
        for normalize in ("none", "input"):
            yield run("figure1", normalize, seed)
    yield run("statistics", "input", 1, "--statistics", "frame", suffix="-frame")
    yield run("joint", "joint", 1)
    for seed in (1, 2, 3):
        for normalize in ("none", "input"):
            more = ("--split", "speaker")
            yield run("speakers", normalize, seed, *more, suffix="-speakers")


def grid():
    """Learning rate x momentum x batch size, around those of the other speech runs."""
    for learning_rate in ("2.6e-4", "7.8e-4", "2.3e-3"):
        for momentum in ("0.5", "0.9"):
            for batch_size in ("32", "64"):
                for normalize in ("none", "input"):
                    yield Run(
                        f"grid-{learning_rate}-{momentum}-{batch_size}-{normalize}",
                        "figure3",
                        "speech_frames",
                        (
                            *("--passes", "1", "--layers", "2", "--units", "32"),
                            *("--epochs", "10", "--learning-rate", learning_rate),
                            *("--momentum", momentum, "--batch-size", batch_size),
                            *("--normalize", normalize),
                        ),
                        data="fsdd",
                    )


def digits():
    for seed in (1, 2, 3, 4, 5):
        for name, arguments in {
            "none": ("--normalize", "none"),
            "input": ("--normalize", "input"),
            "frame": ("--normalize", "input", "--statistics", "frame"),
            "joint": ("--normalize", "joint"),
        }.items():
            yield Run(
                f"digits-{name}-{seed}",
                "digits",
                "sequential_digits",
                (*arguments, "--seed", str(seed)),
            )


def main(argv=None):
    arguments = parse_arguments(argv)
    chosen = [
        run
        for run in runs()
        if not arguments.names or {run.name, run.group} & set(arguments.names)
    ]
    todo = [run for run in chosen if not is_published(run, arguments.log_dir)]
    print(f"{len(chosen)} runs, {len(todo)} of them to be made")
    for run in todo:
        print(f"  {run.group:<11}{run.name:<36}{run.command}")
    if arguments.list:
        return 0
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: arguments.jobs]:
        cores.put(core)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for run, error in zip(
            todo, pool.map(lambda run: make(run, cores, arguments), todo), strict=True
        ):
            if error:
                failed.append(run.name)
                print(f"{run.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", help="of groups or runs (default: all)")
    add("--list", action="store_true", help="only say what would be run")
    add(
        "--data-dir",
        help="folder with Penn Treebank in ptb/ and the Free Spoken Digit Dataset in "
        "fsdd/ (default: downloaded)",
    )
    add("--output-dir", default="runs/experiments", help="(default: runs/experiments)")
    add("--log-dir", type=pathlib.Path, default=LOGS, help=f"(default: {LOGS.name}/)")
    add(
        "--jobs",
        type=training.positive,
        default=len(os.sched_getaffinity(0)),
        help="runs at a time, a core each (default: as many as there are cores)",
    )
    arguments = parser.parse_args(argv)
    known = {name for run in runs() for name in (run.name, run.group)}
    for name in arguments.names:
        if name not in known:
            groups = ", ".join(sorted({run.group for run in runs()}))
            parser.error(
                f"names must be those of runs or of {groups}. Received: {name}"
            )
    if arguments.jobs > len(os.sched_getaffinity(0)):
        parser.error(
            f"--jobs must be at most the {len(os.sched_getaffinity(0))} cores. "
            f"Received: {arguments.jobs}"
        )
    return arguments


def is_published(run, folder=LOGS):
    """Whether the log of this very run is there."""
    path = folder / f"{run.name}.json"
    if not path.exists():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["command"] == run.command


def make(run, cores, arguments):
    """Runs what is left of it and publishes its log.

    Returns:
        What went wrong, or `None`.
    """
    core = cores.get()
    try:
        output = pathlib.Path(arguments.output_dir) / run.name
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, HERE / f"{run.script}.py", *run.arguments]
        command += ["--output-dir", output]
        if run.data and arguments.data_dir:
            command += ["--data-dir", pathlib.Path(arguments.data_dir) / run.data]
        print(f"{run.name} begins on core {core}", flush=True)
        with (output / "output.txt").open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment()
            )
            # At once, before TensorFlow counts the cores and starts its threads.
            os.sched_setaffinity(process.pid, {core})
            process.wait()
        if process.returncode:
            return f"failed with {process.returncode}; see {output / 'output.txt'}"
        publish(run, output, arguments.log_dir)
        print(f"{run.name} ended", flush=True)
        return None
    finally:
        cores.put(core)


def environment():
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def publish(run, output, folder=LOGS):
    """One file of what a run was, where it was made, and what came."""
    (log,) = output.rglob("log.jsonl")
    rows = training.read_log(log)
    record = {
        "name": run.name,
        "command": run.command,
        "machine": machine(),
        "configuration": json.loads((log.parent / "configuration.json").read_text()),
        "epochs": [
            {name: rounded(value) for name, value in row.items()} for row in rows
        ],
        "results": results_of(output / "results.json"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.json"
    path.with_suffix(".part").write_text(as_json(record), encoding="utf-8")
    path.with_suffix(".part").replace(path)


def rounded(value):
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return value if isinstance(value, int) else float(f"{value:.6g}")


def results_of(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    results.pop("epochs", None)
    return results


def as_json(record):
    """A line for each epoch, a line for each other entry."""
    entries = []
    for name, value in record.items():
        if name == "epochs":
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            entries.append(f'  "epochs": [\n{rows}\n  ]')
        else:
            entries.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def machine():
    """What numbers of seconds depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        model = lines[0].split(":")[1].strip() if lines else model
    versions = [f"{p} {importlib.metadata.version(p)}" for p in PACKAGES]
    return {
        "processor": model,
        "cores": 1,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
