"""`kdpipe benchmark`: what a user types, what is written, and what is refused."""

import json
import os

import pytest
from click.testing import CliRunner

from kdpipe.data.manifest import load_manifest
from kdpipe.pipeline.cli import main


@pytest.fixture
def published(tmp_path):
    """A file of MELD with three clips, of which one is missing."""
    (tmp_path / "clips").mkdir()
    names = ["a.wav", "b.wav", "gone\x1b[2J.wav"]
    for name in names[:2]:
        (tmp_path / "clips" / name).write_bytes(b"RIFF")
    items = [
        {"audio": f"meld/{name}", "prompt": "Which emotion?", "gt": "joy", "source": "MELD_test"} for name in names
    ]
    (tmp_path / "meld_eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def run(*args):
    result = CliRunner().invoke(main, ["benchmark", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def import_meld(published, output, *options):
    return run("import", "meld", published / "meld_eval.jsonl", "--audio", published / "clips", "-o", output, *options)


def test_list():
    code, text = run("list")
    assert code == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "mmau",
        "mmar",
        "mmsu",
        "air_bench",
        "meld",
        "iemocap",
        "clotho_aqa",
    ]


def test_import_writes_a_manifest_that_can_be_loaded(published):
    output = published / "manifest.jsonl"
    code, text = import_meld(published, output)
    assert code == 0, text
    assert (
        "3 questions of MELD" in text
        and "Missing clips below" in text
        and ": 1. Evaluate rejects their rows (1), for which" in text
        and "kdpipe evaluate --model train/student --manifest" in text
    )
    assert "\x1b" not in text and "allow_outside" not in text
    manifest = load_manifest(output)
    samples = manifest.select("test")
    assert [sample.audio[0].name for sample in samples][:2] == ["clips/a.wav", "clips/b.wav"]
    assert samples[0].extra["benchmark"] == "meld" and json.loads(samples[0].extra["item"])["gt"] == "joy"
    assert sorted(os.listdir(published)) == ["clips", "manifest.jsonl", "meld_eval.jsonl"], "nothing else is left"


def test_clips_outside_the_manifests_folder(published):
    output = published / "new" / "folder" / "manifest.jsonl"
    code, text = import_meld(published, output)
    assert code == 0 and "data.allow_outside: true" in text
    sample = load_manifest(output, allow_outside=True).samples[0]
    assert sample.audio[0].name == "../../clips/a.wav" and sample.audio[0].path.is_file()


def test_clips_behind_a_link_need_allow_outside(published):
    (published / "run").mkdir()
    (published / "run" / "audio").symlink_to(published / "clips")
    output = published / "run" / "manifest.jsonl"
    code, text = run("import", "meld", published / "meld_eval.jsonl", "--audio", published / "run/audio", "-o", output)
    assert code == 0 and "data.allow_outside: true" in text
    assert load_manifest(output, allow_outside=True).samples[0].audio[0].name == "audio/a.wav"


def test_what_is_there_is_replaced_only_with_force(published):
    output = published / "manifest.jsonl"
    output.write_text("mine")
    code, text = import_meld(published, output)
    assert code == 2 and "exists already" in text and output.read_text() == "mine"
    assert import_meld(published, output, "--force")[0] == 0 and output.read_text() != "mine"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_outputs_that_are_refused(published, force):
    source = published / "meld_eval.jsonl"
    before = source.read_text()
    code, text = import_meld(published, source, *force)
    assert code == 2 and "is the benchmark's own file" in text and source.read_text() == before
    assert "name it like manifest.jsonl" in import_meld(published, published / "manifest.csv", *force)[1]
    (published / "folder.jsonl").mkdir()
    assert "is a folder" in import_meld(published, published / "folder.jsonl", *force)[1]
    (published / "file").write_text("")
    code, text = import_meld(published, published / "file" / "manifest.jsonl", *force)
    assert code == 2 and f"{published / 'file' / 'manifest.jsonl'}: cannot be written" in text


def test_nothing_is_written_where_the_source_is_wrong(published):
    output = published / "manifest.jsonl"
    (published / "meld_eval.jsonl").write_text('{"audio": "a.wav"}\n{"gt": "joy\\u001b"}\nx\n')
    code, text = import_meld(published, output)
    assert code == 2 and text.startswith("Error: 3 problems:") and "\x1b" not in text
    assert "meld_eval.jsonl:1: gt is missing" in text and "meld_eval.jsonl:3: is not JSON" in text
    assert not output.exists()
    assert run("import", "mmao", "x", "--audio", "y")[0] == 2
    assert "Missing option '--audio'" in run("import", "meld", published / "meld_eval.jsonl")[1]


def test_none_of_the_clips_is_there(published):
    code, text = run(
        "import", "meld", published / "meld_eval.jsonl", "--audio", published, "-o", published / "manifest.jsonl"
    )
    assert code == 2 and "none of the 3 clips lies there" in text and not (published / "manifest.jsonl").exists()
