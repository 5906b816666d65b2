"""Decode one clip to mono samples at the model's rate, or say why it cannot be used.

What a file is, its content decides, never its name. libsndfile reads it (WAV, W64, RF64, AIFF, AU, CAF, FLAC, OGG and
MP3; files of other formats are refused), in blocks and no further than the clip may reach, so that memory
is bounded whatever a header claims. Two silences of libsndfile are made up for: a WAV or AIFF file that was cut is read
as a shorter one, and so is an OGG file; both are found in the container itself. In W64, RF64, AU and CAF a missing end
cannot be told.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import BinaryIO, cast

import numpy as np
import soundfile

from kdpipe.data.errors import Rejected
from kdpipe.data.manifest import AudioRef

LOUDEST_PEAK = 100.0
"""Peak amplitude above which float samples cannot be meant as audio: 40 dB over full scale."""
SILENCE_PEAK = 1e-4
"""Peak amplitude (full scale is 1) below which a clip is silent: -80 dBFS."""

MIN_SECONDS = 0.1
"""A clip or range shorter than this is rejected."""

RANGE_SLACK = 0.05
"""Seconds by which `end` may pass the clip's end, which is then the end: manifests hold rounded numbers."""

_FORMATS = frozenset(("WAV", "WAVEX", "W64", "RF64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3"))  # of libsndfile
_BEGINNINGS = (b"RIFF", b"RIFX", b"riff", b"RF64", b"FORM", b".snd", b"dns.", b"caff", b"fLaC", b"OggS")
_RATES = (1_000, 768_000)  # Hz; a header outside states no rate of sound, and the resampling ratio would degenerate
_CHANNELS = 16  # of the longest clip; shorter ones may have more. A small file can hold hours of 255 silent channels
_BLOCK = 1 << 20  # samples over all channels that are decoded at a time
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's answer (its largest integer) when a file does not state its length
_STREAMED_BYTES = 0x7FFFF000  # sizes from here on are what writers to a pipe put into a RIFF header
_MPEG_FRAME = 1152


def decode(
    ref: AudioRef, *, rate: int, start: float | None = None, end: float | None = None, max_seconds: float
) -> np.ndarray:
    """Decode a clip, or a range of it, to mono at `rate`.

    Channels are averaged, then resampled with `torchaudio.functional.resample`.

    Args:
        ref: the clip.
        rate: sampling rate of the result in Hz.
        start: begin of the range in seconds; None for the clip's begin.
        end: end of the range in seconds; None for the clip's end.
        max_seconds: longest clip or range allowed. A longer one is rejected, never cut.

    Returns:
        float32 `[frames]`, full scale 1.

    Raises:
        Rejected: `audio_missing`, `audio_empty`, `audio_unreadable`, `audio_truncated`, `audio_bad_range`,
            `audio_too_long`, `audio_too_short`, `audio_not_finite`, `audio_out_of_range` or
            `audio_silent` (peak below -80 dBFS).
    """
    with _opened(ref) as (stream, size):
        if size == 0:
            raise Rejected("audio_empty", f"{ref.name} holds no bytes")
        _check_complete(stream, size, ref.name)
        stated = _states_length(stream)
        _check_beginning(stream, ref.name)
        try:
            file = soundfile.SoundFile(cast(BinaryIO, _Seeking(stream)))
        except soundfile.SoundFileError as error:
            raise Rejected(
                "audio_unreadable", f"{ref.name} is not audio that libsndfile reads: {_text(error)}"
            ) from error
        with file:
            if file.format not in _FORMATS:
                raise _unknown(ref.name)
            samples = _read_range(file, ref.name, stated=stated, start=start, end=end, max_seconds=max_seconds)
            # libsndfile stops where it took the end to be; what is left may be tags, but not this much.
            if not stated and end is None and stream.tell() < size - 2048:
                raise Rejected(
                    "audio_unreadable",
                    f"{ref.name} is an MP3 of variable bit rate that does not state its length: convert it to FLAC",
                )
            source_rate = file.samplerate
    if not np.isfinite(samples).all():
        raise Rejected("audio_not_finite", f"{ref.name} holds NaN or infinite samples")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST_PEAK:
        raise Rejected(
            "audio_out_of_range",
            f"{ref.name}: its peak is {peak:.1e} of full scale; float samples must lie near -1 to 1",
        )
    if peak < SILENCE_PEAK:
        raise Rejected("audio_silent", f"{ref.name} is silent: its peak is {peak:.1e} of full scale, below -80 dBFS")
    return _resample(samples, source_rate, rate)


@contextlib.contextmanager
def _opened(ref: AudioRef) -> Iterator[tuple[BinaryIO, int]]:
    """The clip as a seekable stream without a name (soundfile would believe the suffix), and its size in bytes."""
    if ref.data is not None:
        yield BytesIO(ref.data), len(ref.data)
        return
    if ref.path is None:
        raise Rejected("audio_missing", "the row has no audio")
    try:
        # Without O_NONBLOCK a named pipe would wait for a writer here.
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
        reason = "audio_missing" if absent else "audio_unreadable"
        raise Rejected(reason, f"{ref.name} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("audio_unreadable", f"{ref.name} is not an ordinary file")
        with open(descriptor, "rb", closefd=False) as stream:
            yield stream, status.st_size
    finally:
        os.close(descriptor)


def _read_range(
    file: soundfile.SoundFile, name: str, *, stated: bool, start: float | None, end: float | None, max_seconds: float
) -> np.ndarray:
    """Read a range in blocks, averaged over channels: float32 `[frames]` at the file's own rate.

    Args:
        file: the open clip.
        name: its name for messages.
        stated: whether the file states its length; where it does not, fewer frames are no sign of damage.
        start: begin in seconds, or None.
        end: end in seconds, or None.
        max_seconds: longest range allowed.

    Raises:
        Rejected: see `decode`.
    """
    rate = file.samplerate
    if not _RATES[0] <= rate <= _RATES[1]:
        raise Rejected("audio_unreadable", f"{name} claims a sampling rate of {rate} Hz")
    if file.frames == 0:
        raise Rejected("audio_empty", f"{name} holds no samples")
    if file.frames >= _UNKNOWN_FRAMES:
        raise Rejected("audio_unreadable", f"{name} does not state its length: write it again, not through a pipe")
    first, last = _frame_range(name, file.frames, rate, start, end)
    wanted = last - first
    if wanted - 0.5 > max_seconds * rate:
        raise Rejected("audio_too_long", f"{name}: {wanted / rate:.2f} s, and {max_seconds:g} s are allowed")
    if wanted * file.channels > _CHANNELS * max_seconds * rate:
        text = f"{name}: {file.channels} channels of {wanted / rate:.2f} s, more than {_CHANNELS} of {max_seconds:g} s"
        raise Rejected("audio_too_long", text)

    samples, got = np.empty(wanted, np.float32), 0
    buffer = np.empty((max(1, min(wanted, _BLOCK // file.channels)), file.channels), np.float32)
    try:
        if first:
            file.seek(first)
        while got < wanted:
            block = file.read(out=buffer[: wanted - got])
            if not len(block):
                break
            with np.errstate(over="ignore", invalid="ignore"):
                block.mean(axis=1, out=samples[got : got + len(block)])
            got += len(block)
    except soundfile.SoundFileError as error:
        text = f"{name} breaks off after {(first + got) / rate:.2f} s: {_text(error)}"
        raise Rejected("audio_truncated", text) from error
    slack = _MPEG_FRAME if file.format == "MP3" else 0  # writers disagree whether the header's own frame counts
    if stated and got < wanted - slack:
        raise Rejected("audio_truncated", f"{name} promises {wanted} frames and holds {got}")
    if got < MIN_SECONDS * rate:
        raise Rejected("audio_too_short", f"{name}: {got / rate:.3f} s, and {MIN_SECONDS:g} s are needed")
    return samples[:got]


def _frame_range(name: str, frames: int, rate: int, start: float | None, end: float | None) -> tuple[int, int]:
    """Turn seconds into frames `[first, last)` of a clip of `frames` frames at `rate` Hz.

    Raises:
        Rejected: `audio_bad_range`.
    """
    seconds = frames / rate
    begin = 0.0 if start is None else start
    finish = seconds if end is None else end
    # Written so that NaN fails, too.
    if not (0 <= begin < seconds and begin < finish <= seconds + RANGE_SLACK):
        raise Rejected(
            "audio_bad_range", f"{name} lasts {seconds:.3f} s, which the range from {begin} to {finish} s leaves"
        )
    return round(begin * rate), min(round(finish * rate), frames)


def _check_complete(stream: BinaryIO, size: int, name: str) -> None:
    """Find a cut end in the container, where libsndfile would read what is left without a word.

    RIFF and AIFF: the sound chunk must lie within the file. OGG (RFC 3533): the last page must be whole and carry the
    end-of-stream flag. The stream is left at its begin.

    Raises:
        Rejected: `audio_truncated`.
    """
    magic = stream.read(4)
    if magic in (b"RIFF", b"RIFX", b"FORM"):
        missing = _missing_chunk_bytes(stream, size, "<" if magic == b"RIFF" else ">")
        if missing:
            raise Rejected("audio_truncated", f"{name} lacks {missing} of the bytes that its header promises")
    elif magic == b"OggS" and not _ogg_ends(stream, size):
        raise Rejected("audio_truncated", f"{name} breaks off: its last OGG page is incomplete or is not the final one")
    stream.seek(0)


def _missing_chunk_bytes(stream: BinaryIO, size: int, order: str) -> int:
    """Bytes that a RIFF or AIFF file is short of the end of its sound chunk (`data`, `SSND`)."""
    position = 12
    for _ in range(256):
        stream.seek(position)
        header = stream.read(8)
        if len(header) < 8:
            return 0
        length: int = struct.unpack(f"{order}I", header[4:])[0]
        end = position + 8 + length
        if header[:4] in (b"data", b"SSND"):
            return 0 if length >= _STREAMED_BYTES else max(0, end - size)
        if end > size:
            return end - size
        position = end + length % 2
    return 0


def _ogg_ends(stream: BinaryIO, size: int) -> bool:
    """Whether the last OGG page is whole and flagged as the stream's end (RFC 3533, section 6)."""
    stream.seek(max(0, size - 65_307))  # the largest page
    tail = stream.read()
    at = tail.rfind(b"OggS\0")
    if at < 0 or len(tail) < at + 27:
        return False
    segments = tail[at + 26]
    whole = len(tail) >= at + 27 + segments + sum(tail[at + 27 : at + 27 + segments])
    return whole and bool(tail[at + 5] & 4)


def _states_length(stream: BinaryIO) -> bool:
    """Whether the frame count that libsndfile gives is stated in the file.

    An MP3 states it in a Xing, Info or VBRI header inside its first frame; without one libsndfile extrapolates from
    the first frame's bit rate. The stream is left at its begin.
    """
    head = stream.read(10)
    position = 0
    if head[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = (byte & 0x7F for byte in head[6:])
        position = 10 + (a << 21 | b << 14 | c << 7 | d)
    stream.seek(position)
    first = stream.read(4096)
    stream.seek(0)
    is_mpeg = head[:3] == b"ID3" or (len(first) > 1 and first[0] == 0xFF and first[1] & 0xE0 == 0xE0)
    return not is_mpeg or any(tag in first for tag in (b"Xing", b"Info", b"VBRI"))


def _check_beginning(stream: BinaryIO, name: str) -> None:
    """Keep what is no sound in one of the known formats from libsndfile. The stream is left at its begin.

    Raises:
        Rejected: `audio_unreadable`.
    """
    head = stream.read(4)
    stream.seek(0)
    if not (head.startswith((*_BEGINNINGS, b"ID3")) or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)):
        raise _unknown(name)


def _unknown(name: str) -> Rejected:
    return Rejected("audio_unreadable", f"{name} is not WAV, W64, AIFF, AU, CAF, FLAC, OGG or MP3: convert it to FLAC")


class _Seeking:
    """A stream that stays where it is when libsndfile seeks before its begin, as damaged headers make it.

    soundfile would print the error's traceback, since it cannot be raised through C.
    """

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.tell, self.read, self.readinto = stream.tell, stream.read, stream.readinto  # type: ignore[attr-defined]

    def seek(self, offset: int, whence: int = 0) -> int:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            return self._stream.seek(offset, whence)
        return self._stream.tell()


def _resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resample float32 `[frames]` from `source` to `target` Hz.

    A ratio that needs terms above 1,000 (44,101 to 16,000 Hz, never a common pair of rates) is rounded to one that
    does not, to within a part in a thousand: the exact kernel would hold billions of numbers.
    """
    if source == target:
        return samples
    import torch
    from torchaudio.functional import resample

    low, high = sorted((source, target))
    ratio = Fraction(low, high).limit_denominator(1000)
    terms = {low: ratio.numerator, high: ratio.denominator}
    with torch.inference_mode():
        return resample(torch.from_numpy(samples), terms[source], terms[target]).numpy()


def _text(error: Exception) -> str:
    """libsndfile's own words, without soundfile's `Error opening <_io.BytesIO object at 0x...>`."""
    return str(getattr(error, "error_string", error)).strip()
