"""The process of one contender of bench_store.py: does as it is told, line by line.

    python store_child.py FOLDER read|cold|write KEY

Asked in JSON on its input, it answers in JSON on its output. It also runs in environments without kdpipe.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import store_cases
import store_peers
from store_cases import Case, Plan, Reader

READERS = {
    "read": {case.key: case for case in (*store_cases.READERS, *store_peers.READERS)},
    "cold": {case.key: case for case in store_cases.COLD},
}

WRITERS = {
    "store": store_cases.write_kdpipe,
    "plain": store_cases.write_plain,
    "plain-shards": store_cases.write_shards,
    "zarr": store_peers.write_zarr,
    "tensorstore": store_peers.write_tensorstore,
    "safetensors": store_peers.write_safetensors,
    "tar": store_peers.write_tar,
    "mds": store_peers.write_mds,
}


class Reading:
    """One reader and its passes."""

    def __init__(self, plan: Plan, case: Case):
        self._plan = plan
        self._case = case
        self._reader: Reader = case.reader(plan, case.threads)

    def open(self) -> dict[str, Any]:
        self._reader.close()
        began = time.perf_counter()
        self._reader.open()
        return {"seconds": time.perf_counter() - began}

    def check(self, order: str) -> dict[str, Any]:
        """A pass that compares every sample with the plan."""
        numbers = self._plan.order(order)
        found, same, size = [], True, 0
        for number, rows in self._reader.samples(numbers):
            found.append(number)
            data = memoryview(rows).cast("B")
            size += len(data)
            if number >= 0:
                same = same and zlib.crc32(data) == self._plan.sums[number]
        if self._case.reader.whole_files:
            same = size > self._plan.bytes
        elif self._case.reader.own_order:
            same = same and sorted(found) == sorted(numbers)
        else:
            same = same and found == numbers
        return {"same": same}

    def timed(self, order: str) -> dict[str, Any]:
        """A pass whose time is taken; opened before."""
        numbers, count = self._plan.order(order), 0
        gc.collect()
        began = time.perf_counter()
        for _ in self._reader.samples(numbers):
            count += 1
        seconds = time.perf_counter() - began
        assert count >= len(numbers) or self._case.reader.whole_files
        return {"seconds": seconds}

    def close(self) -> dict[str, Any]:
        self._reader.close()
        gc.collect()
        return {}


class Writing:
    """One writer, which takes its samples from a memory map that was touched before."""

    def __init__(self, plan: Plan, key: str):
        self._plan = plan
        self._write = WRITERS[key]
        self._rows = plan.raw()

    def write(self, folder: str) -> dict[str, Any]:
        """Writes all samples to a new folder, and flushes them."""
        path = Path(folder)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        os.sync()
        touched = int(self._rows[:, 0].sum(dtype=np.int64)) + int(self._rows[:, -1].sum(dtype=np.int64))
        gc.collect()
        began = time.perf_counter()
        self._write(self._plan, self._rows, path)
        return {"seconds": time.perf_counter() - began, "touched": touched}


def main(folder: str, what: str, key: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not an answer
    plan = Plan.load(Path(folder))
    served: Any = Writing(plan, key) if what == "write" else Reading(plan, READERS[what][key])
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = getattr(served, command)(*arguments)
        except Exception as error:  # the table says why a contender has no numbers
            answer = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
