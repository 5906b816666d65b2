"""A process that decodes clips, one after the other, with little memory: what it is given may be anything.

Reads a length (8 bytes) and as many bytes of a clip, again and again; answers each with one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import soundfile  # noqa: F401
import torch
from torchaudio.functional import resample

from kdpipe.data.audio import decode
from kdpipe.data.errors import Rejected
from kdpipe.data.manifest import AudioRef

RATE = 16_000
MAX_SECONDS = 5.0
ROOM = 512 << 20
"""Bytes of address space beyond what is taken once everything is imported."""


def main() -> None:
    torch.set_num_threads(1)
    resample(torch.zeros(1000), 441, 160)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps({"ready": True}), flush=True)
    while header := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(header, "little"))
        options = json.loads(sys.stdin.buffer.readline())
        began = time.process_time()
        try:
            found = decode(AudioRef(None, data, "clip"), rate=RATE, max_seconds=MAX_SECONDS, **options)
            assert found.dtype == np.float32 and found.ndim == 1 and np.isfinite(found).all()
            answer = {"frames": len(found)}
        except Rejected as rejected:
            answer = {"reason": rejected.reason, "detail": rejected.detail}
        answer |= {"seconds": time.process_time() - began}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
