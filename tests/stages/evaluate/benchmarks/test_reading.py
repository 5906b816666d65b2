"""From published files to rows of a manifest: every format, their oddities, and what is wrong with a file."""

import json

import pytest

from kdpipe.data.errors import KdpipeError, ManifestError
from kdpipe.stages.evaluate.benchmarks import BENCHMARKS, find, item_of


def rows_of(publish, name, items=None):
    file, clips = publish(name, items)
    found = find(name).read(file, clips)
    return found.rows, found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_every_benchmark(publish, name):
    rows, found = rows_of(publish, name)
    assert not found.missing
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["benchmark"] == name and row["split"] == "test" and row["question"] and row["task"]
        assert isinstance(item_of(row["item"], row["id"]), dict)
        assert set(row) <= {
            *("id", "audio", "question", "choices", "answer", "task", "split"),
            *("benchmark", "category", "sub_category", "difficulty", "dataset", "item"),
        }


def test_mmau(publish):
    rows, found = rows_of(publish, "mmau")
    first, second, third = rows
    assert first["id"] == "mmau-u1" and first["task"] == "sound" and first["difficulty"] == "medium"
    assert first["choices"] == ["Man", "Woman", "Man and woman"] and first["answer"] == "Man"
    assert first["sub_category"] == "Acoustic Source Inference" and first["category"] == "Reasoning"
    assert second["choices"] == ["happy", "sad"] and second["answer"] == "sad", "the bare texts"
    assert second["category"] == "Reasoning + Information Extraction" and "sub_category" not in second
    assert json.loads(second["item"])["choices"] == ["(A) happy", "(B) sad"], "the item is as it was published"
    assert "answer" not in third and "category" not in third and third["task"] == "music"
    assert found.notes == ["rows without an answer, which are answered and not scored: 1"]


def test_predictions_in_a_published_file_are_forgotten(publish, miniature):
    (row,), _ = rows_of(
        publish, "mmar", [{**miniature("mmar")[0], "answer_prediction": "one", "model_prediction": "one"}]
    )
    assert row["task"] == "mix-sound-speech" and row["category"] == "Perception Layer"
    assert not {"answer_prediction", "model_prediction"} & set(json.loads(row["item"]))


def test_mmsu(publish):
    first, second = rows_of(publish, "mmsu")[0]
    assert first["choices"] == ["Sad.", "Happy.", "Angry.", "None"] and first["answer"] == "Happy."
    assert (first["task"], first["category"], first["sub_category"]) == ("emotion", "Perception", "Paralinguistics")
    assert second["answer"] == "A", "a choice that is a letter is a text"


def test_air_bench(publish):
    first, second = rows_of(publish, "air_bench")[0]
    assert first["choices"] == ["sad", "happy"] and first["answer"] == "happy", "two choices, and no prefixes"
    assert first["id"] == "air_bench-7" and first["task"] == "Speech_Emotion_iemocap"
    assert second["audio"].endswith("Audio_Grounding_AudioGrounding/g1.flac"), "grounding clips are FLAC"


def test_letter_as_the_answer_is_made_a_text(publish, miniature):
    items = [{**item, "answer_gt": "C"} for item in miniature("air_bench")[1:]]
    (row,), _ = rows_of(publish, "air_bench", items)
    assert row["answer"] == "[2, 3]" and json.loads(row["item"])["answer_gt"] == "[2, 3]"


def test_meld(publish):
    first, second = rows_of(publish, "meld")[0]
    assert first["question"] == "Recognize the emotion." and first["choices"] == ["anger", "joy"]
    assert first["id"] == "meld-dia0_utt0" and first["answer"] == "joy"
    assert second["question"] == "Which emotion does the speaker express?", "only special tokens in the prompt"


def test_iemocap_takes_session_five(publish):
    rows, found = rows_of(publish, "iemocap")
    assert [row["answer"] for row in rows] == ["angry", "neutral", "angry"]
    assert all(row["choices"] == ["angry", "neutral"] for row in rows), "the labels of session 5"
    assert found.notes == ["rows of sessions 1 to 4, which were left out: 1"]


def test_iemocap_from_a_csv(publish, tmp_path):
    _, clips = publish("iemocap")
    file = tmp_path / "iemocap.csv"
    file.write_text("audio,gt,session\nrenamed.wav,angry,Ses05\nother.wav,sad,1\n")
    rows = find("iemocap").read(file, clips).rows
    assert [row["id"] for row in rows] == ["iemocap-renamed"]


def test_clotho_aqa_groups_the_answers(publish):
    first, second = rows_of(publish, "clotho_aqa")[0]
    assert first["answer"] == "yes" and first["category"] == "divided" and "choices" not in first
    assert second["answer"] == "tin", "the first of equally common answers"
    assert [first["id"], second["id"]] == ["clotho_aqa-Rain, on tin", "clotho_aqa-Rain, on tin-2"]
    assert json.loads(first["item"])["answers"] == ["yes", "no", "yes"]


def test_a_list_may_stand_where_lines_are_usual_and_the_other_way_round(publish, tmp_path, miniature):
    _, clips = publish("mmsu")
    listed, lined = tmp_path / "listed.jsonl", tmp_path / "lined.json"
    listed.write_text("\ufeff" + json.dumps(miniature("mmsu")), encoding="utf-8")
    lined.write_text("\n".join(json.dumps(item) for item in miniature("mmsu")))
    benchmark = find("mmsu")
    assert benchmark.read(listed, clips).rows == benchmark.read(lined, clips).rows


def test_clips_of_the_same_name_get_ids_of_their_own(publish):
    items = [{"audio": "meld/dia0_utt0.wav", "gt": "joy"}, {"audio": "dia0_utt0.wav", "gt": "anger"}]
    assert [row["id"] for row in rows_of(publish, "meld", items)[0]] == ["meld-dia0_utt0", "meld-dia0_utt0-2"]


def test_missing_clips_are_named_and_their_rows_kept(publish, miniature):
    items = [*miniature("meld"), {"audio": "/data/../meld/gone.wav", "gt": "joy"}]
    rows, found = rows_of(publish, "meld", items)
    assert found.missing == ["data/meld/gone.wav"] and len(rows) == 3
    assert rows[2]["audio"].endswith("clips/data/meld/gone.wav")


def test_all_clips_missing_is_an_error(publish, tmp_path):
    file, _ = publish("meld")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KdpipeError, match=r"none of the 2 clips lies there; looked for ser/meld/dia0_utt0\.wav, "):
        find("meld").read(file, tmp_path / "empty")
    with pytest.raises(KdpipeError, match="no such folder"):
        find("meld").read(file, tmp_path / "gone")


def test_a_clip_outside_the_folder_is_never_taken(publish, tmp_path, miniature):
    (tmp_path / "outside.wav").write_bytes(b"RIFF")
    items = [*miniature("meld"), {"audio": "../outside.wav", "gt": "joy"}, {"audio": "x" * 300 + ".wav", "gt": "joy"}]
    _, found = rows_of(publish, "meld", items)
    assert found.missing == ["outside.wav", "x" * 300 + ".wav"]
    up = {"task_name": "Audio_Grounding/../../..", "dataset_name": "..", "path": "../outside.wav"}
    _, found = rows_of(publish, "air_bench", [*miniature("air_bench"), {**miniature("air_bench")[0], **up}])
    assert found.missing == ["Audio_Grounding/.._../outside.wav"]


def test_an_answer_that_is_no_choice_is_noted(publish, miniature):
    _, found = rows_of(publish, "mmar", [{**miniature("mmar")[0], "answer": "three"}])
    (note,) = found.notes
    assert note == "rows whose answer is none of their choices, which evaluate rejects: 1 (MMAR-meta.json row 1)"


def test_every_problem_of_a_file_is_told_at_once(publish, miniature):
    items = [
        {**miniature("mmar")[0], "question": None},
        {**miniature("mmar")[0], "choices": "one, two"},
        {**miniature("mmar")[0], "choices": []},
        {**miniature("mmar")[0], "choices": ["one", ["two"]]},
        {**miniature("mmar")[0], "audio_path": {"a": 1}, "answer": True},
        {**miniature("mmar")[0], "question": "a\0b", "category": "\ud800"},
        "no object",
    ]
    with pytest.raises(ManifestError) as error:
        rows_of(publish, "mmar", items)
    row = "MMAR-meta.json row"
    assert sorted(error.value.problems) == [
        f"{row} 1: question is missing",
        f"{row} 2: choices is text: it must be a list of texts",
        f"{row} 3: choices is an empty list: it must be a list of texts",
        f"{row} 4: choices is a list with blanks or of other things: it must be a list of texts",
        f"{row} 5: answer is true or false: it must be one text",
        f"{row} 5: audio_path is an object: it must be one text",
        f"{row} 6: category is not valid text (NUL bytes, or not UTF-8)",
        f"{row} 6: question is not valid text (NUL bytes, or not UTF-8)",
        f"{row} 7: is text: each item must be one JSON object",
    ]


def test_letters_without_their_answer_are_a_problem(publish, miniature):
    items = [{**item, "answer_gt": "[9, 9]"} for item in miniature("air_bench")[1:]]
    with pytest.raises(ManifestError, match=r"row 1: answer_gt '\[9, 9\]' is none of the choices '\[0, 1\]', "):
        rows_of(publish, "air_bench", items)


def test_iemocap_without_a_session_is_a_problem(publish):
    items = [{"audio": "a.wav", "gt": "sad"}, {"audio": "b.wav", "gt": "sad", "session": "six"}, {"gt": "sad"}]
    with pytest.raises(ManifestError) as error:
        rows_of(publish, "iemocap", items)
    assert [text.split(":")[1] for text in error.value.problems[:3]] == ["1", "2", "3"]
    assert "neither a column `session`" in error.value.problems[0]


def test_other_sessions_alone_are_no_items(publish):
    with pytest.raises(ManifestError, match=r"holds no items of IEMOCAP, session 5 \(rows of sessions 1 to 4, .*: 2\)"):
        rows_of(publish, "iemocap", [{"audio": "Ses01F_a.wav", "gt": "sad"}, {"audio": "Ses02F_a.wav", "gt": "sad"}])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b"[{]", "a.json: is not JSON: .* at column 3"),
        ("a.json", b"[\n{\n]", "a.json: is not JSON: .* at line 3, column 1"),
        ("a.jsonl", b'{"gt": "joy"}\n{"gt": \n', "a.jsonl:2: is not JSON"),
        ("a.jsonl", b"[1, null]", "a.jsonl row 1: is a number: each item must be one JSON object\n.* row 2: is null"),
        ("a.json", b"[" * 100_000, "a.json: is not JSON that can be read"),
        ("a.json", b"\xff\xfe", "a.json: is not UTF-8"),
        ("a.json", b"", "holds no items of MELD"),
        ("a.json", b"[]", "holds no items of MELD"),
        ("a.csv", b"audio,gt\na.wav\n", "a.csv:2: has 1 fields, and the header has 2"),
        ("a.csv", b'audio,gt\n"a.wav,joy\n', "a.csv:2: is not CSV"),
        ("a.csv", b"audio,gt\na.wav,\xff\n", "a.csv:2: gt is not valid text"),
        ("a.txt", b"audio", "unknown format"),
        ("a.csv/b.json", None, "no such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=problem):
        find("meld").read(tmp_path / name, tmp_path)


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(KdpipeError, match=r"'AIR-Bench': no such benchmark. Did you mean air_bench\? There are mmau, "):
        find("AIR-Bench")


def test_a_broken_item_is_named():
    for value in (None, "", "[1]", "{", 7):
        with pytest.raises(KdpipeError, match="sample 'x': its row says `benchmark`"):
            item_of(value, "x")
    assert item_of({"a": 1}, "x") == {"a": 1}
