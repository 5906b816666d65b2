"""Names and specifications of the arrays of a part."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdpipe.data.store import format as layout
from kdpipe.data.store.format import (
    ArraySpec,
    distribution_attributes,
    distribution_specs,
    hidden_prefix,
    hidden_specs,
    lens_prefix,
    under,
)


def test_layers_are_written_with_two_digits_or_more():
    assert [lens_prefix(7), lens_prefix(36), hidden_prefix(128)] == ["lens/07", "lens/36", "hidden/128"]
    assert under("top", {"ids": 1, "log_z": 2}) == {"top/ids": 1, "top/log_z": 2}


def test_a_distribution_has_four_arrays():
    assert distribution_specs("top", 64, 2, 16, "float16") == (
        ArraySpec("top/ids", (64,), "uint32"),
        ArraySpec("top/logprob", (64,), "float16"),
        ArraySpec("top/log_z", (2,), "float32"),
        ArraySpec("top/log_tail", (2, 16), "float32"),
    )
    assert sum(spec.row_bytes for spec in distribution_specs("top", 64, 1, 1, "float16")) == 392
    assert distribution_specs("top", 64, 2, 1, "float16", draws=16)[4:] == (ArraySpec("top/draws", (2, 16), "uint32"),)


def test_int8_states_bring_a_scale_a_token():
    assert hidden_specs(3, 3584, "int8") == (
        ArraySpec("hidden/03/states", (3584,), "int8"),
        ArraySpec("hidden/03/scale", (), "float32"),
    )
    assert hidden_specs(3, 3584, "bfloat16") == (ArraySpec("hidden/03/states", (3584,), "bfloat16"),)


@pytest.mark.parametrize("spec", [*distribution_specs("top", 64, 1, 1, "float16"), *hidden_specs(1, 3584, "bfloat16")])
def test_chunks_are_whole_rows_near_the_size_aimed_at(spec: ArraySpec):
    aimed = layout.STATES_CHUNK_BYTES if spec.name.startswith("hidden/") else layout.ROWS_CHUNK_BYTES
    assert aimed - spec.row_bytes < spec.chunk_rows * spec.row_bytes <= aimed
    assert ArraySpec("hidden/01/states", (1 << 20,), "float32").chunk_rows == 1


def test_wrong_specifications_are_refused():
    with pytest.raises(ValueError, match="array a: dtype 'float64' is not one of"):
        ArraySpec("a", (), "float64")
    with pytest.raises(ValueError, match="size below 1"):
        ArraySpec("a", (0,), "int8")
    with pytest.raises(ValueError, match="lack 1"):
        distribution_attributes(k=4, temperatures=[2.0], block_bounds=[0, 5])
    drawn = distribution_attributes(k=4, temperatures=[1.0], block_bounds=[0, 5], draws={"count": 3, "k": 2})
    assert drawn["distributions"]["draws"] == {"count": 3, "k": 2}
    for bounds in ([0], [1, 5], [0, 5, 5]):
        with pytest.raises(ValueError, match="do not rise from 0"):
            distribution_attributes(k=4, temperatures=[1.0], block_bounds=bounds)


def test_the_store_and_the_stream_are_light():
    """Importing them loads neither torch nor zarr; `kdpipe status` may import any of them."""
    program = (
        "import sys, kdpipe.data.store.writer, kdpipe.data.store.reader, kdpipe.data.store.metadata, "
        "kdpipe.data.store.codec, kdpipe.data.stream, kdpipe.data.ledger\n"
        "print(sorted({'torch', 'zarr', 'pyarrow', 'vllm', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
