"""The metrics file tells one story whatever interrupted it."""

from pathlib import Path

import pytest

from kdpipe.stages.train.metrics import MetricsFile, read_metrics


def test_lines_after_the_checkpoint_and_a_torn_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "train" / "metrics.jsonl"
    with MetricsFile(path, 0, tmp_path / "tmp") as metrics:
        for step in (1, 2, 3):
            metrics.append({"step": step, "loss": step / 7})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    with MetricsFile(path, 2, tmp_path / "tmp") as metrics:
        metrics.append({"step": 3, "loss": 9})
    assert read_metrics(path) == [{"step": 1, "loss": 1 / 7}, {"step": 2, "loss": 2 / 7}, {"step": 3, "loss": 9}]
    with MetricsFile(path, 0, tmp_path / "tmp"):
        pass
    assert read_metrics(path) == []


@pytest.mark.parametrize("damage", [b"\xff", b"[1]", b'{"loss": 1}', b'{"step": "3"}', b"[" * 100_000])
def test_lines_that_are_none_end_the_file(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    assert read_metrics(path) == [{"step": 1}]
