"""Decoding: every format, every rate, and every way in which a clip can be unusable."""

import io
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdpipe.data.audio import decode
from kdpipe.data.errors import Rejected
from kdpipe.data.manifest import AudioRef

RATE = 16_000
RECORDINGS = Path(__file__).resolve().parents[2].parent / "shared" / "audio"
FORMATS = [
    ("WAV", "PCM_16", 44_100),
    ("WAV", "PCM_24", 48_000),
    ("WAV", "FLOAT", 16_000),
    ("WAV", "ULAW", 22_050),
    ("AIFF", "PCM_16", 44_100),
    ("FLAC", "PCM_16", 44_100),
    ("OGG", "VORBIS", 44_100),
    ("OGG", "OPUS", 48_000),
    ("MP3", None, 44_100),
]


def tone(seconds=1.0, rate=44_100, hertz=1000.0, peak=0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds=2.0, rate=44_100) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)


def encode(samples: np.ndarray, rate=44_100, form="WAV", subtype: str | None = "PCM_16") -> bytes:
    target = io.BytesIO()
    soundfile.write(target, samples, rate, format=form, subtype=subtype)
    return target.getvalue()


def heard(data: bytes | Path, **options) -> np.ndarray:
    ref = AudioRef(data, None, data.name) if isinstance(data, Path) else AudioRef(None, data, "clip")
    return decode(ref, **{"rate": RATE, "max_seconds": 30.0, **options})


def rejection(data: bytes | Path, **options) -> Rejected:
    with pytest.raises(Rejected) as caught:
        heard(data, **options)
    assert data.name in caught.value.detail if isinstance(data, Path) else "clip" in caught.value.detail
    return caught.value


def without_tag(mp3: bytes) -> bytes:
    """An MP3 without its first frame, which states the length."""
    second = mp3.find(mp3[:2], 4)
    assert b"Xing" in mp3[:second] or b"Info" in mp3[:second]
    return mp3[second:]


@pytest.mark.parametrize(("form", "subtype", "rate"), FORMATS)
def test_formats_in_a_file_of_any_name_and_in_memory(form, subtype, rate, tmp_path):
    left, right = tone(rate=rate), tone(rate=rate, hertz=1700.0)
    data = encode(np.stack((left, right), axis=1), rate, form, subtype)
    samples = heard(data)
    assert samples.dtype == np.float32 and samples.flags.c_contiguous
    assert samples.shape == (RATE,)
    spectrum = np.abs(np.fft.rfft(samples)) / (RATE / 2)
    assert {int(bin) for bin in np.argsort(spectrum)[-2:]} == {1000, 1700}
    assert spectrum[[1000, 1700]] == pytest.approx([0.25, 0.25], abs=0.01)
    for name in ("clip.raw", "clip.wav", "clip.mp3", "clip"):
        (tmp_path / name).write_bytes(data)
        assert np.array_equal(heard(tmp_path / name), samples)


@pytest.mark.parametrize("source", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 44_101, 47_999])
def test_resampling_keeps_frequency_and_amplitude(source):
    samples = heard(encode(tone(2.0, source), source, subtype="FLOAT"))
    assert abs(len(samples) - 2 * RATE) <= 2 * RATE / 1000
    middle = samples[RATE // 2 : RATE // 2 + RATE] * np.hanning(RATE)
    spectrum = np.abs(np.fft.rfft(middle)) / (RATE / 4)
    assert np.argmax(spectrum) == 1000
    assert spectrum[1000] == pytest.approx(0.5, abs=0.005)
    assert np.delete(spectrum, range(990, 1011)).max() < 0.005


def test_same_rate_is_untouched_and_frequencies_beyond_the_rate_are_gone():
    samples = noise(1.0, RATE)
    assert np.array_equal(heard(encode(samples, RATE, subtype="FLOAT")), samples)
    assert np.abs(heard(encode(tone(hertz=12_000.0)))[400:-400]).max() < 0.01


@pytest.mark.parametrize(("form", "subtype", "rate"), FORMATS)
def test_ranges(form, subtype, rate):
    data = encode(noise(2.0, rate), rate, form, subtype)
    whole = heard(data, rate=rate)
    for start, end in ((None, 0.5), (0.5, 1.25), (1.5, None), (0.0, 2.0), (1.9, 2.04)):
        first, last = round((start or 0) * rate), min(round((2.0 if end is None else end) * rate), len(whole))
        part = heard(data, rate=rate, start=start, end=end)
        assert part.shape == (last - first,)
        assert np.abs(part - whole[first:last]).max() < 1e-5


@pytest.mark.parametrize(
    ("start", "end"), [(2.0, None), (9.0, 10.0), (0.0, 2.2), (-0.1, 1.0), (1.0, 1.0), (1.5, 1.0), (np.nan, 1.0)]
)
def test_bad_ranges(start, end):
    assert rejection(encode(noise()), start=start, end=end).reason == "audio_bad_range"
    assert rejection(encode(noise()), end=np.inf).reason == "audio_bad_range"


def test_long_clips_are_rejected_and_never_cut():
    data = encode(noise(2.0))
    assert len(heard(data, max_seconds=2.0)) == 2 * RATE
    assert rejection(data, max_seconds=1.99).reason == "audio_too_long"
    assert len(heard(data, max_seconds=0.5, start=1.0, end=1.5)) == RATE // 2


def test_short_clips():
    assert len(heard(encode(noise(0.1)))) == RATE // 10
    assert rejection(encode(noise(0.0999))).reason == "audio_too_short"
    assert rejection(encode(noise(2.0)), start=1.0, end=1.00001).reason == "audio_too_short"


def test_missing(tmp_path):
    assert rejection(tmp_path / "none.wav").reason == "audio_missing"
    (tmp_path / "file").write_bytes(b"")
    assert rejection(tmp_path / "file" / "none.wav").reason == "audio_missing"
    assert rejection(tmp_path / ("long" * 100)).reason == "audio_missing"
    with pytest.raises(Rejected, match="audio_missing"):
        decode(AudioRef(None, None, "none"), rate=RATE, max_seconds=1.0)


def test_empty(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    assert rejection(tmp_path / "empty.wav").reason == "audio_empty"
    assert rejection(b"").reason == "audio_empty"
    for form in ("WAV", "FLAC"):
        assert rejection(encode(noise(0.0), form=form)).reason == "audio_empty"


def test_what_is_no_audio(tmp_path):
    for data in (b"hello\n" * 500, b"\x89PNG\r\n\x1a\n" + bytes(500), bytes(5000), b"RI", encode(noise())[:40]):
        assert rejection(data).reason in ("audio_unreadable", "audio_truncated")
    assert rejection(b"hello\n" * 500).reason == "audio_unreadable"
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("folder.wav", "pipe.wav"):
        assert rejection(tmp_path / name).reason == "audio_unreadable"


@pytest.mark.parametrize(("form", "subtype", "rate"), FORMATS)
@pytest.mark.parametrize("kept", [0.98, 0.5, 0.2])
def test_cut_files_are_found(form, subtype, rate, kept, tmp_path):
    data = encode(noise(2.0, rate), rate, form, subtype)
    cut = data[: int(len(data) * kept)]
    assert rejection(cut).reason == "audio_truncated"
    (tmp_path / "cut").write_bytes(cut)
    assert rejection(tmp_path / "cut").reason == "audio_truncated"


def test_one_byte_less_is_found_in_wav_flac_and_ogg():
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")):
        assert rejection(encode(noise(), form=form, subtype=subtype)[:-1]).reason == "audio_truncated"


def test_a_damaged_middle_is_found():
    data = bytearray(encode(noise(), form="FLAC"))
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    assert rejection(bytes(data)).reason == "audio_truncated"


def test_wav_from_a_pipe_and_with_other_chunks():
    data = bytearray(encode(tone(rate=RATE), RATE))
    plain = heard(bytes(data))
    note = b"LIST" + struct.pack("<I", 5) + b"hello\0"
    assert np.array_equal(heard(bytes(data[:12]) + note + bytes(data[12:]) + note), plain)
    for size in (0xFFFFFFFF, 0x7FFFF024):
        data[4:8] = data[40:44] = struct.pack("<I", size)
        assert data[36:40] == b"data"
        assert np.array_equal(heard(bytes(data)), plain)


def test_headers_that_lie():
    wav = bytearray(encode(noise()))
    wav[24:28] = struct.pack("<I", 3)
    assert rejection(bytes(wav)).reason == "audio_unreadable"
    flac = encode(noise(), form="FLAC")
    for frames, reason in ((0, "audio_unreadable"), (2**36 - 1, "audio_too_long"), (100_000, "audio_truncated")):
        high, low = frames >> 32, struct.pack(">I", frames & 0xFFFFFFFF)
        lie = flac[:21] + bytes([flac[21] & 0xF0 | high]) + low + flac[26:]
        assert rejection(lie).reason == reason


def test_mp3_without_a_stated_length():
    target = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.5}
    with soundfile.SoundFile(target, "w", 44_100, 1, **options) as file:
        file.write(noise(2.0))
    constant = without_tag(target.getvalue())
    assert len(heard(constant)) == pytest.approx(2 * RATE, abs=0.1 * RATE)
    assert len(heard(b"ID3\x04\0\0\0\0\x02\x01" + bytes(257) + constant)) == len(heard(constant))
    stated = encode(noise(2.0), form="MP3", subtype=None)
    assert len(heard(stated)) == 2 * RATE
    error = rejection(without_tag(stated))
    assert error.reason == "audio_unreadable" and "does not state its length" in error.detail


def test_silence():
    for samples in (np.zeros(RATE, np.float32), tone(rate=RATE, peak=0.9e-4)):
        error = rejection(encode(samples, RATE, subtype="FLOAT"))
        assert error.reason == "audio_silent" and "-80 dBFS" in error.detail
    assert len(heard(encode(tone(rate=RATE, peak=1.1e-4), RATE, subtype="FLOAT"))) == RATE
    opposite = np.stack((tone(rate=RATE), -tone(rate=RATE)), axis=1)
    assert rejection(encode(opposite, RATE, subtype="FLOAT")).reason == "audio_silent"
    late = np.concatenate((np.zeros(RATE, np.float32), tone(rate=RATE)))
    assert rejection(encode(late, RATE), end=0.5).reason == "audio_silent"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value):
    samples = noise(1.0)
    samples[1000] = value
    assert rejection(encode(samples, subtype="FLOAT")).reason == "audio_not_finite"
    both = np.stack((np.full_like(samples, 3e38), np.full_like(samples, 3e38)), axis=1)
    assert rejection(encode(both, subtype="FLOAT")).reason == "audio_not_finite"


@pytest.mark.parametrize("peak", [101.0, -32_768.0, 1e30])
def test_a_peak_that_no_sound_has(peak):
    """Integers written as floats, say: kept, they would drown whatever is normalized with them."""
    samples = noise(1.0)
    samples[1000] = peak
    error = rejection(encode(samples, subtype="FLOAT"))
    assert error.reason == "audio_out_of_range"
    assert f"its peak is {abs(peak):.1e} of full scale" in error.detail


def test_a_loud_clip_is_kept():
    loud = tone(rate=RATE, peak=99.0)
    assert np.array_equal(heard(encode(loud, RATE, subtype="FLOAT")), loud)
    early = np.concatenate((tone(rate=RATE), np.full(RATE, 1e6, np.float32)))
    assert len(heard(encode(early, RATE, subtype="FLOAT"), end=1.0)) == RATE, "what is not asked for does not count"


@pytest.mark.parametrize(("form", "subtype", "rate"), FORMATS)
def test_random_damage_never_escapes_as_another_error(form, subtype, rate):
    data = encode(noise(0.3, rate), rate, form, subtype)
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data[: random.integers(len(data) // 4, len(data) + 1)])
        for at in random.integers(0, min(len(damaged), 200 if random.random() < 0.5 else len(damaged)), 4):
            damaged[at] = random.integers(256)
        try:
            samples = heard(bytes(damaged))
        except Rejected:
            continue
        assert np.isfinite(samples).all() and len(samples) <= 30 * RATE


def test_many_channels_stay_within_a_block():
    data = encode(np.tile(tone(0.2, RATE)[:, None], (1, 256)), RATE)
    assert heard(data) == pytest.approx(tone(0.2, RATE), abs=1e-4)


def test_torch_is_imported_only_to_resample():
    code = "import sys, kdpipe.data.audio; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"the real recordings are not here: {RECORDINGS}")
@pytest.mark.parametrize(("pattern", "rate"), [("fsdd/*_0.wav", 8_000), ("esc10/*/1-*.ogg", 44_100)])
def test_real_recordings(pattern, rate):
    files = sorted(RECORDINGS.glob(pattern))[:40]
    assert len(files) >= 30
    for file in files:
        samples = heard(file)
        info = soundfile.info(file)
        assert info.samplerate == rate
        assert len(samples) == math.ceil(info.frames * RATE / rate)
        assert 1e-3 < np.abs(samples).max() < 1.5
    data = files[0].read_bytes()
    assert np.array_equal(heard(data), heard(files[0]))
    assert rejection(data[: len(data) // 2]).reason == "audio_truncated"


@pytest.mark.parametrize(("form", "subtype"), [("VOC", "PCM_16"), ("SDS", "PCM_16"), ("SVX", "PCM_16")])
def test_formats_that_no_dataset_has_are_refused(form, subtype):
    found = rejection(encode(tone(rate=8000), 8000, form, subtype))
    assert found.reason == "audio_unreadable" and "is not WAV" in found.detail


def test_a_seek_before_the_begin_prints_no_traceback(capfd):
    """soundfile cannot raise through libsndfile, and prints instead."""
    whole = bytearray(encode(tone(0.3, 8000), 8000, "AIFF"))
    whole[4:6] = b"\0\0"
    assert rejection(bytes(whole[:44])).reason.startswith("audio_")
    assert "Traceback" not in capfd.readouterr().err


def test_hundreds_of_channels_as_long_as_the_longest_clip_are_too_much():
    many = np.zeros((30 * 8000, 32), np.float32)
    many[:, 0] = 0.5
    assert rejection(encode(many, 8000)).reason == "audio_too_long"
    assert len(heard(encode(many[: 8000 * 14], 8000))) == 14 * RATE


def test_a_bound_that_no_clip_reaches_is_no_error():
    assert len(heard(encode(tone()), max_seconds=1e308)) == RATE
