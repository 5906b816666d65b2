"""Miniatures of the published files, in their formats."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MMAU = [
    {
        "id": "u1",
        "audio_id": "./test-mini-audios/u1.wav",
        "question": "Who speaks?",
        "choices": ["Man", "Woman", "Man and woman"],
        "answer": "Man",
        "dataset": "AudioSet",
        "task": "sound",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Acoustic Source Inference",
        "difficulty": "medium",
    },
    {
        "id": "u2",
        "audio_id": "./test-mini-audios/u2.wav",
        "question": "Which mood?",
        "choices": ["(A) happy", "(B) sad"],
        "answer": "(B) sad",
        "dataset": "IEMOCAP",
        "task": "speech",
        "split": "test-mini",
        "category": ["Reasoning", "Information Extraction"],
        "difficulty": "easy",
    },
    {"id": "u3", "audio_id": "u3.wav", "question": "Which key?", "choices": ["C", "C major"], "task": "music"},
]

MMAR = [
    {
        "id": "r1",
        "audio_path": "./audio/r1.wav",
        "question": "How many?",
        "choices": ["one", "two"],
        "answer": "two",
        "modality": "mix-sound-speech",
        "category": "Perception Layer",
        "sub-category": "Counting and Statistics",
        "language": "en",
    }
]

MMSU = [
    {
        "id": "s1",
        "task_name": "emotion",
        "audio_path": "/audio/s1.wav",
        "question": "Which mood?",
        "choice_a": "Sad.",
        "choice_b": "Happy.",
        "choice_c": "Angry.",
        "choice_d": "None",
        "answer_gt": "Happy.",
        "category": "Perception",
        "sub-category": "Paralinguistics",
    },
    {
        "id": "s2",
        "task_name": "pitch",
        "audio_path": "/audio/s2.wav",
        "question": "Which note is first?",
        "choice_a": "C",
        "choice_b": "D",
        "choice_c": "A",
        "choice_d": "B",
        "answer_gt": "A",
        "category": "Perception",
        "sub-category": "Phonology",
    },
]

AIR_BENCH = [
    {
        "path": "a1.wav",
        "question": "Which mood?",
        "choice_a": "A. sad",
        "choice_b": "B. happy",
        "choice_c": None,
        "answer_gt": "B. happy",
        "task_name": "Speech_Emotion",
        "dataset_name": "iemocap",
        "uniq_id": 7,
    },
    {
        "path": "g1.wav",
        "question": "When?",
        "choice_a": "[0, 1]",
        "choice_b": "[1, 2]",
        "choice_c": "[2, 3]",
        "choice_d": "[3, 4]",
        "answer_gt": "[2, 3]",
        "task_name": "Audio_Grounding",
        "dataset_name": "AudioGrounding",
        "uniq_id": 8,
    },
]

MELD = [
    {"audio": "ser/meld/dia0_utt0.wav", "prompt": "Recognize the emotion.", "gt": "joy", "source": "MELD_test"},
    {
        "audio": "ser/meld/dia0_utt1.wav",
        "prompt": "<audio>x.wav</audio><|startofanalysis|><|emotion_recognition|>",
        "gt": "anger",
        "source": "MELD_test",
    },
]

IEMOCAP = [
    {"audio": "Session5/Ses05F_impro01_F000.wav", "gt": "angry"},
    {"audio": "Session1/Ses01F_impro01_F000.wav", "gt": "sad"},
    {"audio": "Ses05M_impro01_M001.wav", "gt": "neutral"},
    {"audio": "renamed.wav", "gt": "angry", "session": 5},
]

CLOTHO_AQA = [
    {"file_name": "Rain, on tin.wav", "QuestionText": "Is it raining?", "answer": "yes", "confidence": "yes"},
    {"file_name": "Rain, on tin.wav", "QuestionText": "Is it raining?", "answer": "no", "confidence": "maybe"},
    {"file_name": "Rain, on tin.wav", "QuestionText": "Is it raining?", "answer": "yes", "confidence": "yes"},
    {"file_name": "Rain, on tin.wav", "QuestionText": "On what?", "answer": "tin", "confidence": "yes"},
    {"file_name": "Rain, on tin.wav", "QuestionText": "On what?", "answer": "metal", "confidence": "no"},
    {"file_name": "Rain, on tin.wav", "QuestionText": "On what?", "answer": "roof", "confidence": "no"},
]

PUBLISHED = {
    "mmau": ("mmau-test-mini.json", MMAU, ("test-mini-audios/u1.wav", "test-mini-audios/u2.wav", "u3.wav")),
    "mmar": ("MMAR-meta.json", MMAR, ("audio/r1.wav",)),
    "mmsu": ("mmsu.jsonl", MMSU, ("audio/s1.wav", "s2.wav")),
    "air_bench": (
        "Foundation_meta.json",
        AIR_BENCH,
        ("Speech_Emotion_iemocap/a1.wav", "Audio_Grounding_AudioGrounding/g1.flac"),
    ),
    "meld": ("meld_eval.jsonl", MELD, ("meld/dia0_utt0.wav", "dia0_utt1.wav")),
    "iemocap": (
        "iemocap.jsonl",
        IEMOCAP,
        ("Session5/Ses05F_impro01_F000.wav", "Ses05M_impro01_M001.wav", "renamed.wav"),
    ),
    "clotho_aqa": ("clotho_aqa_test.csv", CLOTHO_AQA, ("Rain, on tin.wav",)),
}
"""Name: file, items, and the clips below the folder of clips."""


def write_items(path: Path, items: list[dict[str, Any]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as text:
            writer = csv.DictWriter(text, items[0])
            writer.writeheader()
            writer.writerows(items)
    elif path.suffix == ".json":
        path.write_text(json.dumps(items, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


@pytest.fixture
def miniature() -> Callable[[str], list[dict[str, Any]]]:
    """The items of a benchmark's miniature, to be changed at will."""
    return lambda name: copy.deepcopy(PUBLISHED[name][1])


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes the miniature of a benchmark, or other items in its file's format; returns file and folder of clips."""

    def write(name: str, items: list[dict[str, Any]] | None = None) -> tuple[Path, Path]:
        file, published, clips = PUBLISHED[name]
        write_items(tmp_path / file, published if items is None else items)
        for clip in clips:
            (tmp_path / "clips" / clip).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "clips" / clip).write_bytes(b"RIFF")
        return tmp_path / file, tmp_path / "clips"

    return write
