"""Moves the labels of a model's versions, in the configuration and on the servers.

`--label stable=N` rolls back if N is the previous version, and rolls out if N is the
next version. A server moves a label only to a version that it has loaded. The script
therefore first tells the servers to load the versions, waits until each version is
AVAILABLE on each server, and then moves the labels. No request is lost, and no label
moves if a version fails to load.
"""

import argparse
import copy
import os
import pathlib
import sys
import time

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2


def main(argv=None):
    args = _parse(argv)
    try:
        head, config = read_config(args.config)
        loaded = change_versions(config, args.model, load=args.versions)
        wanted = change_versions(
            loaded, args.model, labels=args.label, unload=args.unload
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.dry_run:
        print(head + text_format.MessageToString(wanted), end="")
        return 0
    # Imported here, because gRPC is only needed with a server.
    servers = []
    if args.grpc:
        import grpc

        servers = [
            _Server(target, grpc.insecure_channel(target)) for target in args.grpc
        ]
    try:
        # Each step writes the file first. Otherwise a server that polls the old file
        # would undo the step.
        for step in (loaded, wanted):
            write_config(args.config, head, step)
            for server in servers:
                server.reload(step, args.timeout)
            if step is loaded:
                for server in servers:
                    server.wait(args.model, args.versions, args.timeout)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        _undo(args, head, config, servers)
        return 1
    for model in wanted.model_config_list.config:
        if model.name == args.model:
            labels = ", ".join(
                f"{k}={v}" for k, v in sorted(model.version_labels.items())
            )
            versions = list(model.model_version_policy.specific.versions)
            print(f"{model.name}: versions {versions}, labels {labels or 'none'}")
    if not servers:
        print(f"{args.config} is changed; no server was told: servers must poll it")
    return 0


def read_config(path):
    """Reads a model configuration.

    Args:
        path: Path of a ModelServerConfig in text form.

    Returns:
        The comment at the top of the file, a str, and the `ModelServerConfig`.

    Raises:
        ValueError: If the file is not a ModelServerConfig.
    """
    text = pathlib.Path(path).read_text()
    head = []
    for line in text.splitlines(keepends=True):
        if line.strip() and not line.startswith("#"):
            break
        head.append(line)
    config = model_server_config_pb2.ModelServerConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise ValueError(f"{path} must be a ModelServerConfig: {error}") from error
    return "".join(head), config


def write_config(path, head, config):
    """Replaces a model configuration atomically.

    Args:
        path: Path of the file.
        head: str, the comment for the top of the file.
        config: `ModelServerConfig`.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(head + text_format.MessageToString(config))
    os.replace(unfinished, path)


def change_versions(config, model, load=(), labels=None, unload=()):
    """Changes the loaded versions and the labels of a model.

    Args:
        config: `ModelServerConfig`. It is not changed.
        model: str, the name of the model.
        load: Versions to load in addition.
        labels: Dict from label to version: the labels to add or to move.
        unload: Versions to unload.

    Returns:
        The changed copy, a `ModelServerConfig`.

    Raises:
        ValueError: If the configuration has no such model, its policy is not
            `specific`, or a label would name a version that is not loaded.
    """
    config = copy.deepcopy(config)
    found = [m for m in config.model_config_list.config if m.name == model]
    if len(found) != 1:
        names = [m.name for m in config.model_config_list.config]
        raise ValueError(
            f"The configuration must have the model once, among {names}. "
            f"Received: model={model!r}"
        )
    policy = found[0].model_version_policy
    if policy.WhichOneof("policy_choice") != "specific":
        raise ValueError(
            f"The model_version_policy of {model!r} must be `specific`, which names "
            "the versions to load: other policies unload a version that a label names. "
            f"Received: {policy.WhichOneof('policy_choice') or 'none'}"
        )
    versions = sorted(({*policy.specific.versions} | {*load}) - {*unload})
    found[0].version_labels.update(labels or {})
    for label, version in sorted(found[0].version_labels.items()):
        if version not in versions:
            raise ValueError(
                f"A label must name a version that is loaded, one of {versions}. "
                f"Received: {label}={version}"
            )
    policy.specific.versions[:] = versions
    return config


class _Server:
    """Calls the ModelService of a server."""

    def __init__(self, target, channel):
        from tensorflow_serving.apis import model_service_pb2_grpc

        self.target = target
        self._stub = model_service_pb2_grpc.ModelServiceStub(channel)

    def reload(self, config, seconds):
        from tensorflow_serving.apis import model_management_pb2

        request = model_management_pb2.ReloadConfigRequest(config=config)
        status = self._call("HandleReloadConfigRequest", request, seconds).status
        if status.error_code:
            raise RuntimeError(f"{self.target}: {status.error_message}")

    def wait(self, model, versions, seconds):
        """Waits until the versions are AVAILABLE, or raises RuntimeError."""
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = model
        available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        deadline = time.monotonic() + seconds
        while True:
            answer = self._call("GetModelStatus", request, seconds)
            states = {s.version: s for s in answer.model_version_status}
            missing = [
                v for v in versions if v not in states or states[v].state != available
            ]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.target}: versions {missing} of {model!r} are not AVAILABLE "
                    f"after {seconds:g} s\n{answer}"
                )
            time.sleep(0.2)

    def _call(self, method, request, seconds):
        import grpc

        try:
            return getattr(self._stub, method)(request, timeout=seconds)
        except grpc.RpcError as error:
            raise RuntimeError(
                f"{self.target}: {error.code().name}: {error.details()}"
            ) from error


def _undo(args, head, config, servers):
    write_config(args.config, head, config)
    for server in servers:
        try:
            server.reload(config, args.timeout)
        except RuntimeError as error:
            print(f"error: not undone: {error}", file=sys.stderr)


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="rollback.py",
        description=(
            "Move the labels of a model's versions: change the configuration file, "
            "tell each server to load the versions, and move the labels when all "
            "versions are AVAILABLE on all servers. If a version fails to load, the "
            "script restores the configuration and exits with status 1."
        ),
        epilog=(
            "example: python serving/rollback.py serving/config/models.config "
            "--model speech --label stable=1 --grpc 127.0.0.1:8500. Versions stay "
            "loaded until --unload, so that a roll-back is fast. All servers must have "
            "the same configuration."
        ),
    )
    parser.add_argument("config", help="path of models.config, which is changed")
    parser.add_argument("--model", required=True, help="name of the model")
    parser.add_argument(
        "--label",
        type=_label,
        action="append",
        default=[],
        metavar="LABEL=N",
        help="move the label to version N, and load version N if necessary; may be "
        "repeated",
    )
    parser.add_argument(
        "--load",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="load version N, whether or not it has a label; may be repeated",
    )
    parser.add_argument(
        "--unload",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="unload version N, which must have no label; may be repeated",
    )
    parser.add_argument(
        "--grpc",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="server to reconfigure at once; may be repeated. Without it, servers read "
        "the file when they poll it (--model_config_file_poll_wait_seconds)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="time limit for loading in seconds (default %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the new file and change nothing"
    )
    args = parser.parse_args(argv)
    if not (args.label or args.load or args.unload):
        parser.error("give --label, --load or --unload")
    args.label = dict(args.label)
    args.versions = sorted({*args.label.values(), *args.load})
    return args


def _label(text):
    label, _, version = text.partition("=")
    if not (label and version.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be LABEL=N. Received: {text}")
    return label, int(version)


if __name__ == "__main__":
    sys.exit(main())
