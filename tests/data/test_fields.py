"""Named digests that share what they have alike."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from kdpipe.data.fields import Fields, Names, Sharing
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


def test_sharing_gives_back_what_it_was_given():
    share = Sharing()
    given = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"b": "2"}, {}, {"a": "1", "b": "2"}, {"b": "4"}]
    made = [share(fields) for fields in given]
    assert made == given and [list(fields) for fields in made] == [list(fields) for fields in given]


def test_what_is_alike_is_kept_once():
    share, alike = Sharing(), {f"name{n}": "x" * 32 for n in range(11)}
    texts = [json.dumps(alike | {"own": f"{n:032}"}) for n in range(999)]
    share(json.loads(texts[0]))
    tracemalloc.start()
    made = [share(json.loads(text)) for text in texts]
    held = tracemalloc.get_traced_memory()[0] / len(made)
    tracemalloc.stop()
    assert held < 250, f"{held:.0f} bytes a set, where a dict of twelve and its texts take over 1,000"
