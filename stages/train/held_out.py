"""Which samples are held out of training to measure it. Light: planning imports it."""

from __future__ import annotations

import hashlib

NO_TASK = "(none)"
"""What samples without a task are called where losses are told by task."""


def held_out(audio: str, fraction: float) -> bool:
    """Whether a sample is never trained on, decided by its clips alone.

    u = the first 64 bits of SHA-256("kdpipe validation 1/" + audio), over 2^64; held out where u < fraction. So every
    question about the same clips is on the same side, whatever the seed, and a larger share holds out all that a
    smaller one does. Samples that are added to a manifest move no others.

    Args:
        audio: digest of the contents of all clips of the sample.
        fraction: share of the clips to hold out.
    """
    bits = hashlib.sha256(f"kdpipe validation 1/{audio}".encode()).digest()[:8]
    return int.from_bytes(bits, "big") < fraction * 2**64
