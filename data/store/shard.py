"""What the files of an array are: Zarr v3 shards that are raw rows.

An array is chunked along its rows alone, with the codecs `bytes` (little endian) and `crc32c` inside
`sharding_indexed`. So a shard file is chunks one after the other, each followed by the 4 bytes of its CRC32C, then one
pair of uint64 (offset, size) a chunk, then the CRC32C of these. That is valid Zarr, and it is also a memory map.
`shard_writer` writes such files as rows come, `shard_reader` reads them without a copy too many.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from kdpipe.data.store.format import STORED_AS, ArraySpec

CRC_BYTES = 4
ENTRY_BYTES = 16
"""Bytes of a chunk's entry in the index."""

EMPTY = 2**64 - 1
"""Offset and size, in the index, of a chunk that is not there."""

METADATA = "zarr.json"


def crc_of(data: np.ndarray) -> bytes:
    """CRC32C of a contiguous uint8 array, as 4 bytes, little endian."""
    return crc32c(data.data).to_bytes(CRC_BYTES, "little")


def as_json(document: Any) -> bytes:
    """The one way in which kdpipe writes metadata, so that a file can be compared with what it says."""
    return json.dumps(document, indent=1, allow_nan=False).encode("ascii")


def group_document(attributes: Any = None) -> dict[str, Any]:
    """`zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_document(spec: ArraySpec, rows: int, chunk_rows: int, shard_rows: int) -> dict[str, Any]:
    """`zarr.json` of an array."""
    stored = STORED_AS[spec.dtype]
    raw = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if np.dtype(stored).itemsize == 1:
        raw[0] = {"name": "bytes"}
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk_rows, *spec.width],
        "codecs": raw,
        "index_codecs": index,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *spec.width],
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *spec.width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if stored.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"kdpipe_dtype": spec.dtype} if stored != spec.dtype else {},
        "storage_transformers": [],
    }


def shard_file(folder: Path, number: int, inner: int) -> Path:
    """File of a shard of an array with `inner` dimensions beside its rows."""
    return folder.joinpath("c", str(number), *("0" for _ in range(inner)))


@dataclass(frozen=True)
class Grid:
    """Where the rows of an array lie.

    Attributes:
        rows: rows there are.
        row_bytes: bytes of one.
        chunk_rows: rows of a chunk.
        per_shard: chunks of a shard.
    """

    rows: int
    row_bytes: int
    chunk_rows: int
    per_shard: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.chunk_rows * self.row_bytes

    @staticmethod
    def of(document: Any) -> Grid | None:
        """The grid that `zarr.json` of an array describes, or None where its codecs are not ours.

        Raises:
            KeyError, TypeError, ValueError: it is not the metadata of a Zarr v3 array.
        """
        shape, stored = document["shape"], np.dtype(document["data_type"])
        shard = document["chunk_grid"]["configuration"]["chunk_shape"]
        if len(document["codecs"]) != 1 or document["codecs"][0]["name"] != "sharding_indexed":
            return None
        configuration = document["codecs"][0]["configuration"]
        chunk = configuration["chunk_shape"]
        codecs = [codec["name"] for codec in configuration["codecs"]]
        endian = configuration["codecs"][0].get("configuration", {}).get("endian", "little")
        index = [codec["name"] for codec in configuration["index_codecs"]]
        ours = codecs == index == ["bytes", "crc32c"] and endian == "little"
        if not ours or configuration.get("index_location", "end") != "end":
            return None
        if document["chunk_key_encoding"] != {"name": "default", "configuration": {"separator": "/"}}:
            return None
        if not chunk[1:] == shard[1:] == shape[1:] or shard[0] % chunk[0]:
            return None
        row_bytes = stored.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        return Grid(shape[0], row_bytes, chunk[0], shard[0] // chunk[0])
