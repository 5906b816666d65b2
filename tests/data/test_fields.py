"""Named digests that share what they have alike."""

from __future__ import annotations

import json

import pytest

from kdpipe.data.fields import Fields, Names
from kdpipe.data.hashing import digest


def test_they_are_what_a_dict_would_be():
    common, own = {"model": "m", "limits": "l"}, ("a", "q", "w")
    fields = Fields(Names(common, {"question": 1, "limits": 2}), own)
    expected = common | {"question": "q", "limits": "w"}
    assert fields == expected and expected == fields and fields != common
    assert list(fields) == list(expected) and len(fields) == 3 and repr(fields) == repr(expected)
    assert json.dumps(dict(fields)) == json.dumps(expected) and digest(fields) == digest(expected)
    assert "audio" not in fields and fields.get("audio") is None
    with pytest.raises(KeyError, match="audio"):
        fields["audio"]


@pytest.mark.parametrize("own", [("a", "b"), ('"', "%s"), ("ä\n\u2028", "\\"), ("", "😀")])
def test_their_digest_is_that_of_the_mapping(own):
    for common, places in (
        ({"model": "m%s", "li%mits": 'l"', "z": "😀"}, {"question": 1, "answer": 0, "z": 0}),
        ({}, {"b": 1, "a": 0, "%": 1}),
        ({"a": "1"}, {}),
        ({}, {}),
    ):
        fields = Fields(Names(common, places), own)
        assert fields.digest() == digest(dict(fields)) == digest(fields)
