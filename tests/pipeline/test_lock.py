"""One run at a time; the lock dies with its holders."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline.lock import hold


def test_second_holder_is_told_who_works(tmp_path):
    with hold([tmp_path, tmp_path]) as handles:
        assert len(handles) == 1
        with pytest.raises(KdpipeError, match=f"process {os.getpid()} on "), hold([tmp_path]):
            pass
    with hold([tmp_path]):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from kdpipe.pipeline.lock import hold\n"
        "with hold([Path(sys.argv[1])]):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(KdpipeError, match=f"process {process.pid}"), hold([tmp_path]):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with hold([tmp_path]):
        pass


def test_a_stage_that_outlives_its_parent_still_holds_the_lock(tmp_path):
    with hold([tmp_path]) as handles:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=handles)
    try:
        with pytest.raises(KdpipeError, match="another kdpipe works here"), hold([tmp_path]):
            pass
    finally:
        child.kill()
        child.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            with hold([tmp_path]):
                break
        except KdpipeError:
            assert time.monotonic() < deadline


def test_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(KdpipeError, match="cannot be written"), hold([Path(file)]):
        pass


def test_what_stands_in_a_damaged_lock_is_not_believed(tmp_path: Path) -> None:
    with hold([tmp_path]):
        for text in ('{"pid": 1e400, "host": "' + socket.gethostname() + '"}', "[]", "\xff"):
            (tmp_path / "locks" / "run.lock").write_text(text)
            with pytest.raises(KdpipeError, match="another kdpipe works here"), hold([tmp_path]):
                pass
