"""The recordings of the Free Spoken Digit Dataset and their splits."""

import pathlib
import re
import typing
import wave

import keras
import numpy as np

URL = (
    "https://github.com/Jakobovski/free-spoken-digit-dataset/"
    "archive/refs/tags/v1.0.10.zip"
)
FILE_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
DIGITS = range(10)
LEAST_RECORDINGS = 3_000
DEV_INDICES = range(5)  # the official test part
SAMPLE_RATE = 8_000


class Recording(typing.NamedTuple):
    digit: int
    speaker: str
    index: int
    samples: np.ndarray  # (S,), float32 in [-1, 1)


def download():
    """Returns the folder of the data set, and downloads it if necessary."""
    try:
        folder = keras.utils.get_file(
            "free-spoken-digit-dataset", URL, extract=True, archive_format="zip"
        )
    except Exception as error:  # Keras raises no narrower one
        raise SystemExit(
            f"The Free Spoken Digit Dataset cannot be downloaded: {error}. "
            f"Get and unpack {URL} by other means, and name the folder with --data-dir."
        ) from error
    # The archive has one folder, named with its version.
    return next(pathlib.Path(folder).glob("free-spoken-digit-dataset-*"), folder)


def read_recordings(data_dir, partial=False):
    """Reads all recordings of a folder in the order of their file names.

    Args:
        data_dir: Folder with the WAV files or with a folder `recordings` of them.
        partial: Whether a part of the data set is accepted.

    Returns:
        List of `Recording`.

    Raises:
        SystemExit: If a file is missing or differs from the published ones; the
            message says where to get the data set.
    """
    folder = pathlib.Path(data_dir)
    if (folder / "recordings").is_dir():
        folder = folder / "recordings"

    def refuse(path, reason):
        raise SystemExit(
            f"--data-dir must hold the Free Spoken Digit Dataset: {LEAST_RECORDINGS:,} "
            "files {digit}_{speaker}_{index}.wav, 8 kHz, 16 bits, mono, by themselves "
            f"or in a folder `recordings`. Cannot use {path}: {reason}. Get it from "
            f"{URL}"
        )

    if not folder.is_dir():
        refuse(folder, "there is no such folder")
    paths = sorted(folder.glob("*.wav"))
    if not paths or (not partial and len(paths) < LEAST_RECORDINGS):
        refuse(folder, f"it has {len(paths):,} WAV files")
    recordings = []
    for path in paths:
        named = FILE_NAME.fullmatch(path.name)
        if not named:
            refuse(path, "its name is not {digit}_{speaker}_{index}.wav")
        digit, speaker, index = named.groups()
        try:
            samples = read_wav(path)
        except (OSError, EOFError, wave.Error, ValueError) as error:
            refuse(path, str(error) or "it ends before the sound begins")
        recordings.append(Recording(int(digit), speaker, int(index), samples))
    return recordings


def read_wav(path):
    """Reads samples of shape (S,), float32 in [-1, 1).

    Raises:
        ValueError: If the file has no sound or another format.
    """
    with wave.open(str(path), "rb") as file:
        found = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
        if found != (1, 16, SAMPLE_RATE):
            raise ValueError("channels {}, bits {}, sample rate {} Hz".format(*found))
        sound, count = file.readframes(file.getnframes()), file.getnframes()
    if len(sound) != 2 * count or not count:
        raise ValueError(f"it has {len(sound)} bytes of sound for {count} samples")
    return np.frombuffer(sound, "<i2").astype("float32") / np.float32(2**15)


def split(recordings, held_out=None, by="official"):
    """Splits the recordings into training and development.

    Args:
        recordings: List of `Recording`.
        held_out: Development speakers, for by="speaker". Default: the last two.
        by: "official" or "speaker".

    Returns:
        Dict of `train` and `dev`, each a list.
    """
    speakers = sorted({recording.speaker for recording in recordings})
    if by == "speaker":
        held_out = held_out or speakers[-2:]
        unknown = sorted(set(held_out) - set(speakers))
        if unknown or not set(speakers) - set(held_out):
            raise SystemExit(
                f"--held-out must be some, not all, of {', '.join(speakers)}. "
                f"Received: {' '.join(held_out)}"
            )
    parts = {"train": [], "dev": []}
    for recording in recordings:
        if by == "speaker":
            dev = recording.speaker in held_out
        else:
            dev = recording.index in DEV_INDICES
        parts["dev" if dev else "train"].append(recording)
    for part, of_part in parts.items():
        if not of_part:
            raise SystemExit(
                f"--split {by} leaves no recording for the part {part!r} of the "
                f"{len(recordings)} in --data-dir"
            )
    return parts


def require_every_digit(parts, recordings, arguments):
    """Exits with a message if a speaker of a part lacks a digit."""
    everyone = {recording.speaker for recording in recordings}
    for part, of_part in parts.items():
        said = {(recording.speaker, recording.digit) for recording in of_part}
        if arguments.split == "speaker":
            everyone = {recording.speaker for recording in of_part}
        missing = [
            f"{digit} by {speaker}"
            for speaker in sorted(everyone)
            for digit in DIGITS
            if (speaker, digit) not in said
        ]
        if missing:
            raise SystemExit(
                f"--split {arguments.split} needs each digit by each speaker in the "
                f"part {part!r}. Missing in {arguments.data_dir}: {', '.join(missing)}"
            )
