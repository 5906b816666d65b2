"""Clips in a page: the sound, its waveform and its spectrogram."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import soundfile

from kdpipe.data.manifest import AudioRef
from kdpipe.pipeline.report.sound import Room, clip_of, png_bytes, spectrogram_png, wav_bytes, waveform_svg


def unpacked(png: bytes) -> np.ndarray:
    """Shades of a PNG that this module wrote, every checksum proven."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + content)
        chunks[kind], at = content, at + 12 + length
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert len(chunks[b"PLTE"]) == 768 and list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000)).astype(np.float32)


def test_a_picture_holds_its_shades():
    shade = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (unpacked(png_bytes(shade)) == shade).all()


def test_a_higher_tone_lies_higher():
    rows = [int(unpacked(spectrogram_png(tone(hertz))).astype(float).mean(1).argmax()) for hertz in (200, 1000, 4000)]
    assert rows[0] > rows[1] > rows[2]
    both = unpacked(spectrogram_png(np.concatenate([tone(300), tone(3000)])))
    half = both.shape[1] // 2
    assert both[:, : half - 2].astype(float).mean(1).argmax() > both[:, half + 2 :].astype(float).mean(1).argmax()


def test_the_shortest_and_the_silent_have_pictures():
    for samples in (np.zeros(100, np.float32), np.zeros(16_000, np.float32), tone(500, 0.1)):
        assert unpacked(spectrogram_png(samples)).shape[0] == 80
        assert "nan" not in waveform_svg(samples, "x")


def test_the_sound_is_what_the_clip_holds(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(440, 12.0), 16_000)
    room = Room(1_000_000)
    clip = clip_of(AudioRef(tmp_path / "a.wav", None, "a.wav"), start=1.0, end=None, max_seconds=30, room=room)
    assert (clip.seconds, clip.shown) == (11.0, 10.0) and clip.problem == ""
    assert len(wav_bytes(tone(440, 10.0))) == 44 + 2 * 160_000
    assert 1_000_000 - room.left >= len(clip.wav) and clip.wav.startswith("data:audio/wav;base64,")
    loud = re.findall(r"\d+ ([\d.]+)", clip.waveform)
    assert min(map(float, loud)) < 2 and max(map(float, loud)) > 62


def test_without_room_there_are_pictures_alone(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(440), 16_000)
    clip = clip_of(AudioRef(tmp_path / "a.wav", None, "a"), start=None, end=None, max_seconds=30, room=Room(1000))
    assert clip.wav == "" and clip.spectrogram and clip.problem == ""


def test_what_cannot_be_decoded_is_said(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "long.wav", tone(440, 3.0), 16_000)
    for name, reason in (("a.wav", "audio_unreadable"), ("gone.wav", "audio_missing"), ("long.wav", "audio_too_long")):
        clip = clip_of(AudioRef(tmp_path / name, None, name), start=None, end=None, max_seconds=2, room=Room(10**6))
        assert reason in clip.problem and clip.wav == ""
