"""Empty environments for the checks of a release."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


class CheckError(Exception):
    """Raised if a check of the release fails."""


class Environment:
    """A virtual environment with nothing in it but pip.

    Args:
        folder: `pathlib.Path` to create it at.
        python: The interpreter, a path or a name such as `"python3.12"`. Default: the
            one that runs.
    """

    def __init__(self, folder, python=sys.executable):
        self.folder = folder
        subprocess.run([python, "-m", "venv", str(folder)], check=True)

    def install(self, *arguments, cwd=None):
        """Runs `pip install`, and then `pip check`."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check"]
        self.run([*pip, "install", "--quiet", *map(str, arguments)], cwd=cwd)
        self.run([*pip, "check"])

    @property
    def python(self):
        return str(self.folder / "bin/python")

    def run(self, command, cwd=None, env=None, shell=False, timeout=1800):
        """Runs a command as if the environment were activated, outside the checkout.

        Args:
            command: List of str; with `shell`, a str.
            cwd: The folder to run in. Default: the folder of the environment, so that
                Python imports what is installed.
            env: Dict of further environment variables.
            shell: Whether a shell runs the command.
            timeout: Seconds.

        Returns:
            str, what the command printed to standard output.

        Raises:
            CheckError: If the command fails. The message has what it printed.
        """
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env={**self._variables(), **(env or {})},
            shell=shell,
            timeout=timeout,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            shown = command if shell else " ".join(command)
            raise CheckError(
                f"{shown!r} failed with status {done.returncode}:\n"
                f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done.stdout

    def _variables(self):
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        kept.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        path = f"{self.folder / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}"
        return {**kept, "VIRTUAL_ENV": str(self.folder), "PATH": path}


# What git ignores, for a checkout that git cannot read.
IGNORED = (".git", ".venv*", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")


def copy_of_checkout(folder):
    """Copies the files that git tracks, as a fresh clone has them.

    Without git, as in an unpacked archive, it copies all files that git would not
    ignore.

    Args:
        folder: `pathlib.Path` to create.

    Returns:
        `folder`.
    """
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*IGNORED))
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def work_folder():
    """Returns a temporary folder, as a context manager."""
    return tempfile.TemporaryDirectory(prefix="keras_bnrnn-")
