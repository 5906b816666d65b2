"""A clip in a page: the sound itself as a WAV, its waveform as SVG and its spectrogram as PNG, all in the page's text.

Dimension key: N samples, F frames of the spectrogram, B its rows.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from kdpipe.data.errors import Rejected
from kdpipe.pipeline.report.values import visible

if TYPE_CHECKING:
    import numpy as np

    from kdpipe.data.manifest import AudioRef

RATE = 16_000
"""Hz, of the sound in the page."""
SECONDS = 10.0
"""The most of a clip that the page holds."""

_WINDOW, _HOP = 400, 160  # samples: 25 ms every 10 ms
_BINS, _ROWS, _COLUMNS = 1024, 80, 320  # of the transform (zero-padded), and of the picture
_RANGE = 80.0  # dB below the loudest point
_ANCHORS = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # dark to light
_WIDTH, _HEIGHT = 320, 64


@dataclass(frozen=True)
class Clip:
    """What the page holds of one clip.

    Attributes:
        name: what the manifest calls it.
        problem: why there is nothing of it, or empty.
        seconds: how long it is.
        shown: how much of it is in the page (seconds).
        wav: `data:` address of the sound; empty where the page holds none.
        waveform: drawing; empty without.
        spectrogram: `data:` address of the picture.
    """

    name: str
    problem: str = ""
    seconds: float = 0.0
    shown: float = 0.0
    wav: str = ""
    waveform: Markup = Markup("")
    spectrogram: str = ""


@dataclass
class Room:
    """What is left of the page's room for sound (characters)."""

    left: int

    def take(self, size: int) -> bool:
        """Takes some of it, if there is enough."""
        if size > self.left:
            return False
        self.left -= size
        return True


def clip_of(ref: AudioRef, *, start: float | None, end: float | None, max_seconds: float, room: Room) -> Clip:
    """Decodes a clip and makes what the page holds of it; never fails over what the clip holds.

    Args:
        ref: the clip.
        start, end: range of it (seconds), or None.
        max_seconds: `data.max_seconds`; a longer one is refused, as everywhere.
        room: for the sound; without enough of it there are pictures alone.
    """
    import numpy as np

    from kdpipe.data.audio import decode

    try:
        samples = decode(ref, rate=RATE, start=start, end=end, max_seconds=max_seconds)
    except Rejected as error:
        return Clip(ref.name, problem=f"cannot be shown: {error.detail} ({error.reason})")
    except (OSError, MemoryError, ImportError) as error:
        return Clip(ref.name, problem=f"cannot be shown: {error}")
    shown = np.clip(samples[: int(SECONDS * RATE)], -1.0, 1.0)
    seconds = len(samples) / RATE
    wav = _address("audio/wav", wav_bytes(shown))
    if not room.take(len(wav)):
        wav = ""
    picture = _address("image/png", spectrogram_png(shown))
    return Clip(ref.name, "", seconds, len(shown) / RATE, wav, waveform_svg(shown, ref.name), picture)


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def wav_bytes(samples_N: np.ndarray) -> bytes:
    """A mono WAV file of 16 bits at `RATE`, from float samples of full scale 1."""
    import wave

    import numpy as np

    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.round(samples_N * 32767).astype("<i2").tobytes())
    return content.getvalue()


def waveform_svg(samples_N: np.ndarray, name: str) -> Markup:
    """Lowest and highest sample of each of 320 columns, as one closed path; louder than half scale fills the height."""
    import numpy as np

    columns = min(_WIDTH, len(samples_N))
    edges = np.linspace(0, len(samples_N), columns, endpoint=False).astype(int)
    scale = _HEIGHT / 2 / max(0.5, float(np.abs(samples_N).max()))
    high = _HEIGHT / 2 - scale * np.maximum.reduceat(samples_N, edges)
    low = _HEIGHT / 2 - scale * np.minimum.reduceat(samples_N, edges) + 0.5
    xs = np.arange(columns) * (_WIDTH / columns)
    there = [f"{x:.0f} {y:.1f}" for x, y in zip(xs, high, strict=True)]
    back = [f"{x:.0f} {y:.1f}" for x, y in zip(xs[::-1], low[::-1], strict=True)]
    said = f"Waveform of {visible(name)}, {len(samples_N) / RATE:.1f} seconds"
    return Markup(
        f'<svg class="wave" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(said)}"><path d="M{"L".join(there + back)}Z"/></svg>'
    )


def spectrogram_png(samples_N: np.ndarray) -> bytes:
    """Power over time and mel-scaled frequency (0 to 8 kHz, from bottom to top), 80 dB from dark to light, as a PNG."""
    import numpy as np

    padded = np.pad(samples_N, (0, max(0, _WINDOW - len(samples_N))))
    starts = np.arange(0, len(padded) - _WINDOW + 1, _HOP)
    frames = padded[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    bands = _bands()
    power = np.abs(np.fft.rfft(frames, _BINS, axis=1)[:, : bands[-1]]) ** 2
    power_FB = np.add.reduceat(power, bands[:-1], axis=1) / np.diff(bands)
    columns = min(_COLUMNS, len(frames))
    edges = np.linspace(0, len(frames), columns, endpoint=False).astype(int)
    counts = np.diff(np.append(edges, len(frames)))
    power_FB = np.add.reduceat(power_FB, edges, axis=0) / counts[:, None]
    level = 10 * np.log10(np.maximum(power_FB / max(float(power_FB.max()), 1e-20), 1e-12))
    shade = np.clip((level + _RANGE) / _RANGE * 255, 0, 255).astype(np.uint8)
    return png_bytes(shade.T[::-1])


def _bands() -> np.ndarray:
    """First bin of each row, and the end of the last: equal steps in mel (2595 log10(1 + f / 700)), a bin at least."""
    import numpy as np

    most = 2595 * np.log10(1 + RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, most, _ROWS + 1) / 2595) - 1)
    found = np.round(hertz * _BINS / RATE).astype(int)
    for place in range(1, len(found)):
        found[place] = max(found[place], found[place - 1] + 1)
    return found


def png_bytes(shade: np.ndarray) -> bytes:
    """A picture of 256 shades, uint8 [rows, columns], as a PNG with a palette (W3C PNG, colour type 3)."""
    import numpy as np

    rows, columns = shade.shape
    places = np.linspace(0, len(_ANCHORS) - 1, 256)
    anchors = np.array(_ANCHORS, np.float64)
    palette = np.stack([np.interp(places, np.arange(len(_ANCHORS)), anchors[:, c]) for c in range(3)], 1)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), shade], 1)  # each begins with its filter: none
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (
            (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            (b"PLTE", palette.astype(np.uint8).tobytes()),
            (b"IDAT", zlib.compress(lines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )
