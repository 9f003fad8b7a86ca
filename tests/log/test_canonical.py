import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import FormatError, InvalidInputError
from actstore.log.canonical import canonical_json, check_exact, fingerprint, frame, parse_json_object, unframe

# Any JSON that a configuration could hold, floats and awkward strings included.
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(keys, v, max_size=4), max_leaves=12
)
objects = st.dictionaries(keys, values, max_size=5)


@given(objects)
def test_reads_back_equal_and_is_a_fixed_point(value):
    data = canonical_json(value)
    again = json.loads(data)
    assert again == value
    assert canonical_json(again) == data
    check_exact(parse_json_object(data), data)


@given(objects, st.randoms(use_true_random=False))
def test_order_of_keys_does_not_matter(value, rng):
    items = list(value.items())
    rng.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)
    assert fingerprint(dict(items)) == fingerprint(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_their_bits_and_their_type(value):
    again = json.loads(canonical_json([value]))[0]
    assert type(again) is float
    assert math.copysign(1, again) == math.copysign(1, value)
    assert again == value


def test_known_bytes():
    # By hand from the rules: sorted keys, no spaces, UTF-8, integers stay integers, floats stay floats.
    value = {"z": (1, 1.0, True), "ä": '\n"é\u2028', "a": {"10": None, "9": -0.0}}
    expected = '{"a":{"10":null,"9":-0.0},"z":[1,1.0,true],"ä":"\\n\\"é\u2028"}'
    assert canonical_json(value) == expected.encode()


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        1 << 64,
        -(1 << 63) - 1,
        {1: "key"},
        {"a": b"bytes"},
        {"a": {1, 2}},
        "\ud800",
        {"\udfff": 1},
        object(),
    ],
)
def test_refuses_what_json_cannot_hold_exactly(value):
    with pytest.raises(InvalidInputError):
        canonical_json({"x": [value]})


def test_refuses_what_has_no_end():
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(InvalidInputError, match="nested"):
        canonical_json(endless)


@pytest.mark.parametrize(
    "line",
    [
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1e2}',
        b'{"a":1E+2}',
        b'{"a":"\\u0041"}',
        b'{"a":100.00}',
    ],
)
def test_other_spellings_are_not_exact(line):
    with pytest.raises(FormatError):
        check_exact(parse_json_object(line), line)


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"1", b"{", b'{"a":NaN}', b'{"a":Infinity}', b"\xff", b"[" * 100_000]
)
def test_other_bytes_are_not_an_object(line):
    with pytest.raises(FormatError):
        parse_json_object(line)


@given(objects)
def test_frame_reads_back(value):
    assert unframe(frame(value)) == value


@given(objects, st.data())
def test_a_frame_with_any_byte_changed_is_refused(value, data):
    good = bytearray(frame(value))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        unframe(bytes(good))
