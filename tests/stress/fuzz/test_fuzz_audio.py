"""Damaged and lying audio files, decoded in a process with little memory: samples come out, or a rejection."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import strategies as st

from . import decode_child
from .fuzzing import apply, edits, fuzz

RECORDINGS = Path(__file__).resolve().parents[4] / "shared" / "audio"
MOST_SECONDS = 5.0  # of a processor, for one clip of a few thousand bytes
FORMATS = {
    **{
        f"wav {kind}": ("WAV", kind)
        for kind in ("PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM")
    },
    **{f"w64 {kind}": ("W64", kind) for kind in ("PCM_16",)},
    **{f"rf64 {kind}": ("RF64", kind) for kind in ("PCM_16",)},
    **{f"aiff {kind}": ("AIFF", kind) for kind in ("PCM_16", "FLOAT")},
    **{f"caf {kind}": ("CAF", kind) for kind in ("PCM_16", "ALAC_16")},
    **{f"ogg {kind}": ("OGG", kind) for kind in ("VORBIS", "OPUS")},
    **{"au": ("AU", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III")},
    **{"voc": ("VOC", "PCM_16"), "nist": ("NIST", "PCM_16"), "svx": ("SVX", "PCM_16"), "xi": ("XI", "DPCM_16")},
    **{"paf": ("PAF", "PCM_16"), "mat5": ("MAT5", "PCM_16"), "sds": ("SDS", "PCM_16"), "htk": ("HTK", "PCM_16")},
}


@lru_cache
def seeds() -> dict[str, bytes]:
    """Clips of a third of a second in every format, and two real recordings where they are."""
    found = {}
    for name, (form, subtype) in FORMATS.items():
        target = io.BytesIO()
        rate, channels = (48_000, 2) if subtype in ("OPUS", "VORBIS") else (8_000, 1)
        tone = 0.3 * np.sin(np.arange(rate // 3) / 7)
        soundfile.write(target, np.stack([tone] * channels, 1), rate, format=form, subtype=subtype)
        found[name] = target.getvalue()
    for name, path in (("real wav", "fsdd/0_jackson_0.wav"), ("real ogg", "esc10/dog_bark")):
        at = RECORDINGS / path
        if at.exists():
            found[name] = (at if at.is_file() else min(at.iterdir())).read_bytes()[:20_000]
    return found


class Decoder:
    """The other process, and what is asked of it."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, decode_child.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        assert "Traceback" not in said, said[-3000:]  # as of a callback of libsndfile; mpg123 prints warnings
        assert line, f"the process ended with status {self._process.wait(10)}"
        return json.loads(line)

    def __call__(self, data: bytes, **options: Any) -> dict[str, Any]:
        """Decodes a clip: `frames`, or `reason` and `detail`."""
        assert self._process.stdin is not None
        self._process.stdin.write(len(data).to_bytes(8, "little") + data + json.dumps(options).encode() + b"\n")
        self._process.stdin.flush()
        found = self._answer()
        assert found["seconds"] < MOST_SECONDS, found
        if "reason" in found:
            assert found["reason"].startswith("audio_") and found["detail"].startswith("clip"), found
        else:
            assert 0 < found["frames"] <= math.ceil(decode_child.MAX_SECONDS * decode_child.RATE), found
        return found

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Decoders:
    """A decoder, another one after it died."""

    def __init__(self) -> None:
        self._one: Decoder | None = None

    def __repr__(self) -> str:
        return "<decoders>"

    def __call__(self, data: bytes, **options: Any) -> dict[str, Any]:
        self._one = self._one or Decoder()
        try:
            return self._one(data, **options)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._one is not None:
            self._one.close()
        self._one = None


@pytest.fixture(scope="module")
def decode() -> Iterator[Decoders]:
    found = Decoders()
    yield found
    found.close()


def test_the_seeds_are_heard(decode: Decoders) -> None:
    heard = {name: decode(data) for name, data in seeds().items()}
    unread = {name for name, found in heard.items() if "frames" not in found} - {"real ogg"}
    assert unread == {"voc", "nist", "svx", "xi", "paf", "mat5", "sds", "htk"}, heard


@fuzz(0.09, name=st.sampled_from(sorted(seeds())), changes=edits(4))
def test_bytes(decode: Decoders, name: str, changes: Any) -> None:
    decode(apply(seeds()[name], changes))


ODD_FIELDS = (0, 1, 2, 3, 255, 1024, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 4_000_000_000, 768_001, 999, 1000)


@fuzz(
    0.06,
    name=st.sampled_from(sorted(seeds())),
    at=st.integers(0, 120),
    value=st.one_of(st.sampled_from(ODD_FIELDS), st.integers(0, 2**32 - 1)),
    form=st.sampled_from(("<H", ">H", "<I", ">I", "<Q", ">Q")),
    cut=st.sampled_from((None, None, 44, 60, 100, 1000)),
)
def test_headers_that_lie(decode: Decoders, name: str, at: int, value: int, form: str, cut: int | None) -> None:
    data = bytearray(seeds()[name])
    raw = struct.pack(form, value & (1 << 8 * struct.calcsize(form)) - 1)
    data[at : at + len(raw)] = raw
    decode(bytes(data[:cut]))


@fuzz(
    0.03,
    channels=st.sampled_from(ODD_FIELDS),
    rate=st.sampled_from((*ODD_FIELDS, 8_000, 44_100, 768_000)),
    bits=st.sampled_from((0, 1, 8, 16, 24, 32, 64, 65535)),
    tag=st.sampled_from((1, 3, 6, 7, 0x11, 2, 0x31, 0x55, 0xFFFE, 0)),
    size=st.sampled_from((0, 1, 100, 2**31 - 1, 2**31, 2**32 - 1, 0x7FFFF000)),
    held=st.integers(0, 3000),
)
def test_wav_headers(decode: Decoders, channels: int, rate: int, bits: int, tag: int, size: int, held: int) -> None:
    channels, width = channels & 0xFFFF, max(1, bits // 8)
    block = channels * width & 0xFFFF
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block, bits & 0xFFFF)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + b"\x11\x22" * (held // 2)
    decode(b"RIFF" + struct.pack("<I", len(body)) + body)


@fuzz(
    0.02,
    name=st.sampled_from(("wav PCM_16", "flac", "ogg VORBIS", "mp3", "caf ALAC_16")),
    start=st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 0.5)),
    end=st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 0.5)),
    changes=st.one_of(st.just([]), edits(2)),
)
def test_ranges(decode: Decoders, name: str, start: float | None, end: float | None, changes: Any) -> None:
    decode(apply(seeds()[name], changes), start=start, end=end)
