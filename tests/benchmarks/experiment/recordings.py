"""The real recordings, divided among the splits: no recording is heard in two of them."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from kdpipe.data.audio import decode
from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.data.manifest import AudioRef

SAMPLE_RATE = 16_000
SPLITS = ("train", "val", "test")
SPEAKERS = ("jackson", "nicolas", "theo", "yweweler")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SOUNDS = {
    "baby": "baby_cry",
    "chainsaw": "chainsaw",
    "clock": "clock_tick",
    "dog": "dog_bark",
    "rain": "rain",
    "rooster": "rooster",
}
"""Word of a sound, and its folder. Fire, helicopter, sea and sneeze are left out: 0.6 s of them are hard to tell."""
LONGEST_DIGIT = 0.65
"""Seconds; longer recordings of a digit (one in 30) are left out, so that three fit beside a sound."""
TEST_TAKES, VAL_TAKES = range(5), range(5, 8)
"""Takes of each digit and speaker; the first five are the test set by convention."""
TEST_FOLD, VAL_FOLD, VAL_SOUNDS = 3, 2, 2
"""Sounds of fold 3 are the test set, the last two of fold 2 in each class are for validation."""


class Recordings:
    """The recordings of one split.

    Args:
        folder: holds `fsdd/` and `esc10/`.
        split: one of `SPLITS`.

    Attributes:
        digits: paths by speaker and digit.
        sounds: paths by word of the sound.

    Raises:
        KdpipeError: the folder lacks recordings.
    """

    def __init__(self, folder: Path, split: str):
        self.digits: dict[tuple[str, int], list[Path]] = defaultdict(list)
        self.sounds: dict[str, list[Path]] = {}
        for path in sorted((folder / "fsdd").glob("*.wav")):
            digit, speaker, take = path.stem.split("_")
            if _split_of_take(int(take)) == split and _seconds(path) <= LONGEST_DIGIT:
                self.digits[speaker, int(digit)].append(path)
        for word, name in SOUNDS.items():
            self.sounds[word] = [path for path, its in _sounds(folder / "esc10" / name) if its == split]
        empty = [word for word, paths in self.sounds.items() if not paths]
        empty += [
            f"{speaker} {digit}" for speaker in SPEAKERS for digit in range(10) if not self.digits[speaker, digit]
        ]
        if empty:
            raise KdpipeError(
                f"{folder}: no recordings for the split {split} of {', '.join(empty[:5])}. "
                "Name the folder that holds fsdd/ and esc10/ with --recordings."
            )


@lru_cache(4000)
def samples_of(path: Path) -> np.ndarray:
    """A recording at 16 kHz, mono, float32."""
    try:
        return decode(AudioRef(path, None, path.name), rate=SAMPLE_RATE, max_seconds=10)
    except Rejected as rejected:
        raise KdpipeError(f"{path}: {rejected.detail}. Restore the recording.") from None


def excerpt(samples: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A piece of a sound, of those places where it is not much quieter than at its loudest (sounds hold silences)."""
    starts = np.arange(0, len(samples) - length + 1, SAMPLE_RATE // 20)
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    loud = energy[starts + length] - energy[starts]
    start = int(rng.choice(starts[loud >= 0.4 * loud.max()]))
    return samples[start : start + length]


def _split_of_take(take: int) -> str:
    return "test" if take in TEST_TAKES else "val" if take in VAL_TAKES else "train"


def _sounds(folder: Path) -> list[tuple[Path, str]]:
    """Recordings of one class, each with its split."""
    paths = sorted(folder.glob("*.ogg"))
    held = [path for path in paths if path.name.startswith(f"{VAL_FOLD}-")][-VAL_SOUNDS:]
    return [
        (path, "test" if path.name.startswith(f"{TEST_FOLD}-") else "val" if path in held else "train")
        for path in paths
    ]


def _seconds(path: Path) -> float:
    import soundfile

    return soundfile.info(path).duration
