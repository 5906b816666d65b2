"""Names and specifications of the arrays of a part."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdpipe.data.store import format as layout
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import (
    PART,
    TOKENS,
    ArraySpec,
    hidden_attributes,
    hidden_prefix,
    hidden_specs,
    lens_prefix,
    starts_name,
    under,
)

QWEN = (0, 151_936)


def test_layers_are_written_with_two_digits_or_more():
    assert [lens_prefix(7), lens_prefix(36), hidden_prefix(128)] == ["lens/07", "lens/36", "hidden/128"]
    assert under("top", {"ids": 1, "log_z": 2}) == {"top/ids": 1, "top/log_z": 2}


def test_a_distribution_of_fixed_k_has_four_arrays():
    """Ids in 18 bits each; the range of each token beside one-byte log-probabilities; draws where there are any."""
    assert Layout(64, 64, (1.0, 2.0), (0, 9, 151_936)).specs("top") == (
        ArraySpec("top/ids", (144,), "uint8"),
        ArraySpec("top/logprob", (64,), "float16"),
        ArraySpec("top/log_z", (2,), "float32"),
        ArraySpec("top/log_tail", (2, 2), "float16"),
    )
    assert Layout(64, 64, (1.0,), QWEN).bytes_per_token() == 144 + 128 + 4 + 2
    assert Layout(64, 64, (1.0,), QWEN, logprob="float32").specs("top")[-1].dtype == "float32"
    assert Layout(64, 64, (1.0,), QWEN, logprob="uint8").specs("top")[1:3] == (
        ArraySpec("top/logprob", (64,), "uint8"),
        ArraySpec("top/range", (2,), "float16"),
    )
    drawn = Layout(64, 64, (1.0, 2.0), QWEN, draws={"count": 16, "k": 64}).specs("top")
    assert drawn[4:] == (ArraySpec("top/draws", (2, 16), "uint32"),)


def test_a_distribution_of_a_mass_has_entries_and_bytes_on_axes_of_their_own():
    assert Layout(64, 64, (1.0,), QWEN, mass=0.99).specs("lens/07")[:3] == (
        ArraySpec("lens/07/count", (), "uint8"),
        ArraySpec("lens/07/ids", (), "uint8", "lens/07/bytes"),
        ArraySpec("lens/07/logprob", (), "float16", "lens/07/entries"),
    )
    assert Layout(64, 64, (1.0,), QWEN, mass=0.99).bytes_per_token(10) == 1 + 10 * (18 / 8 + 2) + 4 + 2


def test_the_starts_of_an_axis_have_its_name_but_those_of_tokens():
    assert (starts_name(TOKENS), starts_name("top/bytes")) == ("offsets", "top/bytes")


def test_states_bring_a_scale_a_token_and_a_basis_a_part():
    assert hidden_specs(3, 3584, "int8") == (
        ArraySpec("hidden/03/states", (3584,), "int8"),
        ArraySpec("hidden/03/scale", (), "float32"),
    )
    assert hidden_specs(3, 3584, "bfloat16") == (ArraySpec("hidden/03/states", (3584,), "bfloat16"),)
    assert hidden_specs(3, 3584, "fp8") == (
        ArraySpec("hidden/03/states", (3584,), "float8_e4m3fn"),
        ArraySpec("hidden/03/scale", (), "float32"),
    )
    basis = ArraySpec("hidden/03/basis", (3584,), "float16", PART)
    assert hidden_specs(3, 3584, "low_rank", 256) == (ArraySpec("hidden/03/states", (256,), "bfloat16"), basis)
    assert hidden_specs(3, 3584, "low_rank_int8", 256) == (
        ArraySpec("hidden/03/states", (256,), "int8"),
        ArraySpec("hidden/03/scale", (), "float32"),
        basis,
    )
    with pytest.raises(ValueError, match="size below 1"):
        hidden_specs(3, 3584, "low_rank")


def test_the_rank_is_told_where_there_is_one():
    assert hidden_attributes(codec="int8", layers=[3], width=8) == {
        "states": {"codec": "int8", "layers": [3], "width": 8}
    }
    assert hidden_attributes(codec="low_rank", layers=[3], width=8, rank=2)["states"]["rank"] == 2


@pytest.mark.parametrize("spec", [*Layout(64, 64, (1.0,), QWEN).specs("top"), *hidden_specs(1, 3584, "bfloat16")])
def test_chunks_are_whole_rows_near_the_size_aimed_at(spec: ArraySpec):
    aimed = layout.STATES_CHUNK_BYTES if spec.name.startswith("hidden/") else layout.ROWS_CHUNK_BYTES
    assert aimed - spec.row_bytes < spec.chunk_rows * spec.row_bytes <= aimed
    assert ArraySpec("hidden/01/states", (1 << 20,), "float32").chunk_rows == 1


def test_wrong_specifications_are_refused():
    with pytest.raises(ValueError, match="array a: dtype 'float64' is not one of"):
        ArraySpec("a", (), "float64")
    with pytest.raises(ValueError, match="size below 1"):
        ArraySpec("a", (0,), "int8")


def test_the_store_and_the_stream_are_light():
    """Importing them loads neither torch nor zarr; `kdpipe status` may import any of them."""
    program = (
        "import sys, kdpipe.data.store.writer, kdpipe.data.store.reader, kdpipe.data.store.metadata, "
        "kdpipe.data.store.codec, kdpipe.data.store.distributions, kdpipe.data.store.arena, kdpipe.data.stream, "
        "kdpipe.data.ledger\n"
        "print(sorted({'torch', 'zarr', 'pyarrow', 'vllm', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
