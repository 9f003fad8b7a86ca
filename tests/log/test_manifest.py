import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.log.actions import parse_action
from actstore.log.canonical import frame
from actstore.log.manifest import (
    After,
    Manifest,
    Writer,
    decode,
    encode,
    manifest_key,
    normalise,
    parse_manifest_key,
)
from actstore.log.values import Add, Create, Fence, Format, Seal, StoredObject, Tomb
from tests.log.test_canonical import objects as json_objects

ints = st.integers(0, (1 << 63) - 1)
hex64 = st.text("0123456789abcdef", min_size=64, max_size=64)
hex32 = st.text("0123456789abcdef", min_size=32, max_size=32)
kinds = st.sampled_from(["run", "corpus", "tokenization", "dictionary"])
ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_@-]{0,20}", fullmatch=True).filter(
    lambda s: s.lower() not in {"con", "prn", "aux", "nul"} and not s.lower().startswith(("com", "lpt"))
)
object_keys = st.from_regex(r"runs/[a-z0-9_]{1,8}/[a-z0-9~@=-]{0,8}[a-z]", fullmatch=True).filter(
    lambda k: not any(p[0] in "~@=-" for p in k.split("/"))
)
stored = st.builds(StoredObject, object_keys, st.integers(1, 1 << 40), hex64)
stored_lists = st.lists(stored, max_size=3, unique_by=lambda o: o.key).map(tuple)
actions = st.one_of(
    st.builds(Create, kinds, ids, json_objects, json_objects),
    st.builds(Fence, kinds, ids, ints),
    st.builds(Add, kinds, ids, ints, hex64, ints, ints, ints, hex32, stored_lists, json_objects),
    st.builds(Seal, kinds, ids, ints, ints, ints, stored_lists, json_objects),
    st.builds(
        Tomb,
        st.lists(object_keys, min_size=1, max_size=3, unique=True).map(tuple),
        st.just("2026-01-02T03:04:05Z"),
    ),
    st.builds(Format, st.just(1), st.just(1)),
)
manifests = st.builds(
    Manifest,
    version=st.integers(1, 1 << 60),
    parent=hex64,
    txn=st.from_regex(r"[!-~]{1,40}", fullmatch=True),
    writer=st.builds(Writer, st.text("abc.-", max_size=20), ints, st.just("0.1.0")),
    time=st.just("2026-01-02T03:04:05.678Z"),
    actions=st.lists(actions, min_size=1, max_size=3).map(tuple),
    after=st.builds(After, ints, ints, ints, ints, hex64),
)

EXAMPLE = Manifest(
    version=17,
    parent="ab" * 32,
    txn="6f0e",
    writer=Writer("host", 42, "0.1.0"),
    time="2026-01-02T03:04:05Z",
    actions=(
        Add(
            "run",
            "r",
            1,
            "cd" * 32,
            3,
            100,
            0,
            "ef" * 16,
            (StoredObject("runs/r/layers.0.resid_post/c/3/0", 123, "01" * 32),),
            {"nonfinite": {"layers.0.resid_post": 0}},
        ),
    ),
    after=After(1, 4, 400, 999, "23" * 32),
)


@settings(max_examples=60)
@given(manifests)
def test_round_trip(manifest):
    data = encode(manifest)
    again = decode(data, version=manifest.version)
    assert again == manifest
    assert encode(again) == data
    assert normalise(manifest.actions) if Format not in map(type, manifest.actions) else True


def test_known_bytes():
    # Written by hand from FORMAT.md; the checksum is the standard CRC-32.
    line = (
        '{"acts":[{"attempt":"'
        + "ef" * 16
        + '","epoch":1,"fingerprint":"'
        + "cd" * 32
        + '","id":"r","kind":"run",'
        '"meta":{"nonfinite":{"layers.0.resid_post":0}},"nonfinite":0,"objects":[{"key":"runs/r/layers.0.resid_post/c/3/0",'
        '"nbytes":123,"sha256":"'
        + "01"
        * 32
        + '"}],"op":"add","rows":100,"unit":3}],"after":{"bytes":999,"collections":1,'
        '"rows":400,"state":"' + "23" * 32 + '","units":4},"fmt":"AM-1","parent":"' + "ab" * 32 + '",'
        '"t":"2026-01-02T03:04:05Z","txn":"6f0e","v":17,"writer":{"host":"host","pid":42,"version":"0.1.0"}}\n'
    ).encode()
    assert encode(EXAMPLE) == line + f"{zlib.crc32(line):08x}\n".encode()


def test_every_single_bit_flip_is_refused():
    good = encode(EXAMPLE)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode(bytes(bad), version=17)


def test_every_truncation_and_extension_is_refused():
    good = encode(EXAMPLE)
    for size in range(len(good)):
        with pytest.raises(FormatError) as caught:
            decode(good[:size], version=17)
        assert manifest_key(17) in str(caught.value)
    for extra in (b"\n", b"\0", b" ", b"{}", good):
        with pytest.raises(FormatError):
            decode(good + extra, version=17)
        with pytest.raises(FormatError):
            decode(extra + good, version=17)


def _changed(change):
    plain = json.loads(encode(EXAMPLE)[:-10])
    change(plain)
    return frame(plain)


def _set(*path, to):
    def change(plain):
        for key in path[:-1]:
            plain = plain[key]
        plain[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_set("fmt", to="AM-2"), ErrorKind.FORMAT_TOO_NEW),
        (_set("fmt", to="XX"), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "op", to="replace"), ErrorKind.FORMAT_TOO_NEW),
        (_set("acts", 0, "more", to=1), ErrorKind.FORMAT_TOO_NEW),
        (_set("more", to=1), ErrorKind.FORMAT_TOO_NEW),
        (_set("acts", 0, "objects", 0, "key", to="../../etc/passwd"), ErrorKind.MANIFEST_DAMAGED),
        (
            _set("acts", 0, "objects", 0, "key", to="manifests/00000000000000000003.json"),
            ErrorKind.MANIFEST_DAMAGED,
        ),
        (_set("acts", 0, "objects", 0, "key", to="_hint"), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "objects", 0, "nbytes", to=0), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "objects", 0, "nbytes", to=1.0), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "objects", 0, "sha256", to="AB" * 32), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "rows", to=1 << 63), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "rows", to=-1), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "rows", to=True), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "id", to="../up"), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "id", to="nul"), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", 0, "kind", to="Run"), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", to=[]), ErrorKind.MANIFEST_DAMAGED),
        (_set("acts", to=[1]), ErrorKind.MANIFEST_DAMAGED),
        (_set("v", to=16), ErrorKind.MANIFEST_DAMAGED),
        (_set("parent", to=None), ErrorKind.MANIFEST_DAMAGED),
        (_set("t", to="yesterday"), ErrorKind.MANIFEST_DAMAGED),
        (_set("txn", to=""), ErrorKind.MANIFEST_DAMAGED),
        (_set("after", "state", to="x"), ErrorKind.MANIFEST_DAMAGED),
        (_set("writer", to="me"), ErrorKind.MANIFEST_DAMAGED),
    ],
)
def test_well_framed_but_wrong(change, kind):
    with pytest.raises(FormatError) as caught:
        decode(_changed(change), version=17)
    assert caught.value.kind is kind
    assert manifest_key(17) in str(caught.value)


@pytest.mark.parametrize(
    "fmt", [Format(2, 2), Format(1, 1, ("quantized",)), Format(2, 1, ("a", "b"))], ids=lambda fmt: repr(fmt)
)
def test_store_of_a_newer_format_is_refused(fmt):
    manifest = Manifest(0, None, "t", EXAMPLE.writer, EXAMPLE.time, (fmt,), EXAMPLE.after)
    with pytest.raises(FormatError) as caught:
        decode(encode(manifest), version=0)
    assert caught.value.kind is ErrorKind.FORMAT_TOO_NEW


def test_reordered_keys_are_refused():
    plain = json.loads(encode(EXAMPLE)[:-10])
    line = json.dumps(dict(reversed(plain.items())), separators=(",", ":")).encode() + b"\n"
    with pytest.raises(FormatError, match="canonical"):
        decode(line + f"{zlib.crc32(line):08x}\n".encode(), version=17)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_format_error(data):
    with pytest.raises(FormatError):
        decode(data, version=1)


@given(json_objects)
def test_any_object_gives_a_format_error(plain):
    with pytest.raises(FormatError):
        decode(frame(plain), version=1)
    with pytest.raises(FormatError):
        parse_action({"op": "add", **plain})


@pytest.mark.parametrize(
    "action",
    [
        Create("run", "a/b", {}, {}),
        Create("Run", "a", {}, {}),
        Fence("run", "a", -1),
        Seal("run", "a", 0, 1, 1, (StoredObject("a", 1, "00"),), {}),
        Tomb(("a", "a"), "2026-01-02T03:04:05Z"),
        Tomb(("manifests/x",), "2026-01-02T03:04:05Z"),
        Tomb(("a",), "soon"),
    ],
)
def test_writers_are_told_about_bad_actions(action):
    with pytest.raises(InvalidInputError):
        normalise([action])


def test_keys():
    assert parse_manifest_key(manifest_key(0)) == 0
    assert parse_manifest_key("manifests/00000000000000000012.json") == 12
    assert parse_manifest_key("manifests/12.json") is None
    assert parse_manifest_key("manifests/00000000000000000012.json.bak") is None
