"""Names of hook points: grammar, aliases, patterns."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.hook_points import (
    LAYER_PARTS,
    canonical_hook_point,
    describe_hook_points,
    expand_hook_points,
    layer_order,
    parse_hook_point,
)
from actstore.names import check_key, hook_point_folder


def available(n_layers):
    layers = [f"layers.{i}.{part}" for i in range(n_layers) for part in LAYER_PARTS]
    return ["embed", *layers, "final_norm"]


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("embed", "embed"),
        ("hook_embed", "embed"),
        ("layers.3.resid_post", "layers.3.resid_post"),
        ("blocks.3.hook_resid_post", "layers.3.resid_post"),
        ("blocks.0.hook_resid_pre", "layers.0.resid_pre"),
        ("blocks.11.hook_attn_out", "layers.11.attn_out"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp_out"),
        ("blocks.3.mlp.hook_post", "layers.3.mlp_act"),
        ("blocks.3.attn.hook_z", "layers.3.attn_z"),
        ("blocks.3.hook_resid_mid", "layers.3.resid_mid"),
        ("blocks.3.ln2.hook_in", "layers.3.resid_mid"),
        ("blocks.3.hook_mlp_in", "layers.3.mlp_in"),
        ("blocks.3.mlp.hook_in", "layers.3.mlp_in"),
        ("blocks.3.hook_in", "layers.3.resid_pre"),
        ("blocks.3.hook_out", "layers.3.resid_post"),
        ("embed.hook_out", "embed"),
        ("final_norm", "final_norm"),
        ("ln_final.hook_normalized", "final_norm"),
        ("ln_final.hook_out", "final_norm"),
        ("blocks.*.hook_resid_post", "layers.*.resid_post"),
        ("blocks.{4..8}.hook_resid_post", "layers.{4..8}.resid_post"),
        ("layers.3", "layers.3.resid_post"),
        ("layers.3.mlp", "layers.3.mlp_out"),
        ("h.3", "layers.3.resid_post"),
        ("h.3.mlp", "layers.3.mlp_out"),
        ("layers.*", "layers.*.resid_post"),
        ("  layers.{0..2}.mlp ", "layers.{0..2}.mlp_out"),
        ("module:a.0.b", "module:a.0.b:output"),
        ("module:a.0.b:input", "module:a.0.b:input"),
        ("nonsense", "nonsense"),
        ("blocks.3.hook_nonsense", "blocks.3.hook_nonsense"),
    ],
)
def test_aliases(alias, canonical):
    assert canonical_hook_point(alias) == canonical
    assert canonical_hook_point(canonical) == canonical


def test_parse():
    point = parse_hook_point("blocks.10.hook_mlp_out")
    assert (point.name, point.layer, point.part, point.module) == ("layers.10.mlp_out", 10, "mlp_out", None)
    point = parse_hook_point("module:layers.0.mlp.gate:input")
    assert (point.module, point.side, point.layer) == ("layers.0.mlp.gate", "input", None)
    assert parse_hook_point("hook_embed").part == "embed"
    point = parse_hook_point("ln_final.hook_normalized")
    assert (point.name, point.layer, point.part, point.module) == ("final_norm", None, "final_norm", None)
    for part in LAYER_PARTS:
        assert (parse_hook_point(f"layers.7.{part}").layer, parse_hook_point(f"layers.7.{part}").part) == (
            7,
            part,
        )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "layers",
        "layers.x.resid_post",
        "layers.01.resid_post",
        "layers.1.resid",
        "Embed",
        "layers.-1.mlp_out",
    ],
)
def test_parse_refuses(name):
    with pytest.raises(NotFoundError) as caught:
        parse_hook_point(name)
    assert caught.value.kind is ErrorKind.HOOK_POINT_NOT_FOUND
    assert "resid_post" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "module:",
        "module:a b",
        "module:a/b",
        "module:..",
        "module:a:side",
        "module:a:input:x",
        "module:" + "a" * 200,
    ],
)
def test_bad_modules_are_refused(name):
    with pytest.raises((InvalidInputError, NotFoundError)):
        parse_hook_point(name)


def test_the_order_is_that_of_computing():
    """Parts that stores already hold keep their order among themselves."""
    assert list(LAYER_PARTS) == (
        [
            "resid_pre",
            "attn_z",
            "attn_out",
            "resid_mid",
            "mlp_in",
            "router",
            "mlp_act",
            "mlp_out",
            "resid_post",
        ]
    )
    names = ["module:a:output", "final_norm", "layers.10.resid_pre", "layers.9.resid_post", "embed"]
    assert sorted(names, key=layer_order) == names[::-1]


def test_parts_of_a_later_version_are_found_in_a_store_and_stand_last_in_their_layer():
    names = [*available(2), "layers.1.other"]
    assert expand_hook_points("layers.*.other", names) == ("layers.1.other",)
    assert expand_hook_points("layers.1.other,layers.1.resid_post,layers.1.router", names) == (
        "layers.1.router",
        "layers.1.resid_post",
        "layers.1.other",
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("embed", ["embed"]),
        ("layers.*.resid_post", [f"layers.{i}.resid_post" for i in range(12)]),
        ("layers.{4..8}.resid_post", [f"layers.{i}.resid_post" for i in range(4, 9)]),
        (
            "layers.{0,11}.{mlp_out,attn_out}",
            ["layers.0.attn_out", "layers.0.mlp_out", "layers.11.attn_out", "layers.11.mlp_out"],
        ),
        (
            "layers.10.resid_post, layers.9.resid_post,embed",
            ["embed", "layers.9.resid_post", "layers.10.resid_post"],
        ),
        (["layers.3", "blocks.3.hook_resid_post", "layers.3.resid_post"], ["layers.3.resid_post"]),
        ("layers.1[01].mlp_act", ["layers.10.mlp_act", "layers.11.mlp_act"]),
        ("layers.?.resid_pre", [f"layers.{i}.resid_pre" for i in range(10)]),
        ("layers.{10..11}", ["layers.10.resid_post", "layers.11.resid_post"]),
        ("layers.0.*", [f"layers.0.{part}" for part in LAYER_PARTS]),
        ("*", available(12)),
    ],
)
def test_expand(patterns, expected):
    assert list(expand_hook_points(patterns, available(12))) == expected


@pytest.mark.parametrize(
    "patterns",
    [
        "layers.12.resid_post",
        "layers.{8..12}.resid_post",
        "nothing",
        "embed,nothing",
        "layers.3.resid_pots",
        "*.resid_post",
    ],
)
def test_no_match_is_an_error(patterns):
    with pytest.raises(NotFoundError) as caught:
        expand_hook_points(patterns, available(12))
    assert caught.value.kind is ErrorKind.HOOK_POINT_NOT_FOUND
    assert f"layers.{{0..11}}.{{{','.join(LAYER_PARTS)}}}" in str(caught.value)


def test_close_names_are_offered():
    with pytest.raises(NotFoundError, match=re.escape("did you mean layers.3.resid_post")):
        expand_hook_points("layers.3.resid_pots", available(12))


@pytest.mark.parametrize(
    "patterns",
    [
        "",
        [],
        " , ",
        "layers.{8..4}.resid_post",
        "layers.{0..99999999}.resid_post",
        "layers.{0..999}.{0..999}",
    ],
)
def test_malformed_patterns_are_refused(patterns):
    with pytest.raises(InvalidInputError):
        expand_hook_points(patterns, available(12))


def test_modules():
    modules = ["layers", "layers.0", "layers.0.gate", "layers.1.gate", "layers.10.gate"]

    def expand(patterns, prefix=""):
        return expand_hook_points(patterns, available(2), modules=modules, module_prefix=prefix)

    assert expand("module:layers.0.gate") == ("module:layers.0.gate:output",)
    assert expand("module:layers.*.gate:input") == tuple(f"module:layers.{i}.gate:input" for i in (0, 1, 10))
    assert expand("module:model.layers.0.gate", "model") == ("module:layers.0.gate:output",)
    assert expand("module:layers.0.gate,embed,layers.1") == (
        "embed",
        "layers.1.resid_post",
        "module:layers.0.gate:output",
    )
    with pytest.raises(NotFoundError, match=re.escape("did you mean module:layers.0.gate:output")):
        expand("module:layers.0.gte")
    # A stored run lists its own module places; others do not exist there.
    stored = ["module:a.b:output"]
    assert expand_hook_points("module:a.b", stored) == ("module:a.b:output",)
    with pytest.raises(NotFoundError):
        expand_hook_points("module:a.c", stored)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 120), st.sampled_from(LAYER_PARTS)), min_size=1, max_size=30),
    st.randoms(),
)
def test_order_is_by_layer_whatever_was_asked_first(pairs, random):
    names = [f"layers.{i}.{part}" for i, part in pairs] + ["embed", "final_norm"]
    random.shuffle(names)
    expected = [
        "embed",
        *(
            f"layers.{i}.{part}"
            for i, part in sorted(set(pairs), key=lambda p: (p[0], LAYER_PARTS.index(p[1])))
        ),
        "final_norm",
    ]
    assert list(expand_hook_points(names, available(121))) == expected
    assert sorted(set(names), key=layer_order) == expected
    # What is drawn together in the description means the same names.
    assert list(expand_hook_points(describe_hook_points(names), available(121))) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True), min_size=1, max_size=8),
    st.sampled_from(["", ":input", ":output"]),
)
def test_every_name_is_a_key(parts, side):
    name = parse_hook_point(f"module:{'.'.join(parts)}{side}").name
    assert check_key(f"runs/a/{hook_point_folder(name)}/zarr.json")
