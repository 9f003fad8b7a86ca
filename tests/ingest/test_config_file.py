"""One configuration in four forms: Python, TOML, command-line words, and the command of a Ray Job, all the same."""

import argparse
import dataclasses
import shlex
import string
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.cli import ingest_options
from actstore.ingest.cli.ingest import add_arguments
from actstore.ingest.config import CODE_DTYPES, CODECS, KEEPS, POLICIES, POOLINGS, IngestConfig
from actstore.ingest.config_file import (
    config_arguments,
    config_fields,
    config_toml,
    make_config,
    parse_config,
    read_config_file,
)
from actstore.ingest.submit import make_entrypoint

# No program can be given a zero byte.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
NASTY = st.sampled_from(
    [
        "-x",
        "--config=/etc/passwd",
        "$(id)",
        "`id`",
        "a;b",
        "a b",
        "'",
        '"',
        "\\",
        "{a,b}",
        "%s",
        "é🙂",
        "a\nb",
        "#",
        "=",
    ]
)
WORDS = st.one_of(TEXT, NASTY)
NAME = st.text(string.ascii_letters + string.digits, min_size=1, max_size=10).filter(
    lambda s: s.lower() not in ("con", "prn", "aux", "nul") and s.lower()[:3] not in ("com", "lpt")
)
# A comma outside braces divides names on a command line, and no hook point has one there; nor is any empty.
HOOK = WORDS.filter(lambda s: "," not in s and "{" not in s and "}" not in s)
SHARE = st.floats(min_value=0.001, max_value=1)


@st.composite
def configs(draw):
    """Configurations that pass their own check, every field drawn."""
    workers = draw(st.integers(1, 9))
    keep = draw(st.lists(st.sampled_from(KEEPS), min_size=1, max_size=3, unique=True))
    values = {
        "corpus": draw(NAME),
        "model": draw(WORDS),
        "hook_points": draw(
            st.lists(st.one_of(HOOK, st.just("layers.{1..2}.mlp_out")), min_size=1, max_size=3)
        ),
        "run": draw(NAME),
        "revision": draw(st.none() | WORDS),
        "tokenizer": draw(st.none() | WORDS),
        "window": draw(st.none() | st.integers(2, 9999)),
        "overlap": draw(st.integers(0, 99)),
        "rows_per_unit": draw(st.just("auto") | st.integers(1, 1 << 20)),
        "keep": keep,
        "seed": draw(st.integers(0, (1 << 63) - 1)),
        "dtype": draw(st.sampled_from(["auto", "fp16", "bfloat16"])),
        "compute_dtype": draw(st.sampled_from(["auto", "fp32", "bf16"])),
        "attn_implementation": draw(st.none() | WORDS),
        "compile": draw(st.booleans()),
        "gpus_per_worker": draw(st.none() | st.integers(0, 8)),
        "batch_tokens": draw(st.integers(1, 1 << 20)),
        "nonfinite": draw(st.sampled_from(POLICIES)),
        "workers": workers,
        "min_workers": draw(st.integers(1, workers)),
        "ray_address": draw(
            st.sampled_from(["local", "auto", "ray://h:1"] if workers > 1 else [None, "local"])
        ),
        "max_attempts": draw(st.integers(1, 9)),
        "allow_failed": draw(st.integers(0, 9)),
        "straggler_factor": draw(st.just(0.0) | st.floats(1.01, 1e6)),
        "self_check": 0.0 if keep == ["codes"] else draw(st.just(0.0) | SHARE),
        "commit_units": draw(st.integers(1, 999)),
        "commit_interval_s": draw(st.floats(0, 1e6)),
        "retry_s": draw(st.floats(0, 1e6)),
        "start_timeout_s": draw(st.floats(0, 1e6)),
    }
    device = draw(st.sampled_from([("auto", None), ("cpu", None), ("auto", "balanced")]))
    values["device"], values["device_map"] = device
    if "dense" in keep:
        values["sample"] = draw(SHARE)
        values["covariance"] = draw(st.booleans())
        values["codec"] = draw(st.sampled_from(CODECS))
    if "pooled" in keep:
        values["poolings"] = draw(st.lists(st.sampled_from(POOLINGS), min_size=1, unique=True))
    if "pooled" in keep or "codes" in keep:
        values["pool_special"] = draw(st.booleans())
    if "codes" in keep:
        values["dictionary"] = draw(st.lists(NAME, min_size=1, max_size=3, unique=True))
        values["codes_dtype"] = draw(st.sampled_from(CODE_DTYPES))
        values["pool_top_m"] = draw(st.integers(1, 1 << 20))
        values["postings_memory_mb"] = draw(st.integers(1, 1 << 30))
    return IngestConfig(**values).check()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(made)
    return made


def from_words(words):
    return ingest_options.parse_config_arguments(parser().parse_args(words))


def same(a: IngestConfig, b: IngestConfig) -> bool:
    def plain(config):
        return {
            k: list(v) if isinstance(v, list | tuple) else v for k, v in dataclasses.asdict(config).items()
        }

    return plain(a) == plain(b)


@settings(max_examples=120, deadline=None)
@given(configs(), WORDS)
def test_a_configuration_is_the_same_as_toml_as_words_and_as_a_jobs_command(config, store):
    read = parse_config(config_toml(config, store=store).encode(), name="x.toml")
    assert read.store == store
    assert same(make_config(read.settings), config)

    found_store, from_options = from_words([*config_arguments(config), "--", store])
    assert found_store == store
    assert same(from_options, config)

    words = shlex.split(make_entrypoint(store, config, python="/bin/py thon"))
    assert words[:4] == ["/bin/py thon", "-m", "actstore.cli", "ingest"]
    assert same(from_words(words[4:])[1], config)


@settings(max_examples=60, deadline=None)
@given(configs(), configs())
def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path_factory, in_file, on_line):
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(in_file.to_toml(store="from-file"), encoding="utf-8")
    assert same(IngestConfig.from_toml(path), in_file)
    assert from_words(["--config", str(path)])[0] == "from-file"
    assert from_words(["--config", str(path), "elsewhere"])[0] == "elsewhere"
    # What the line gives, and only that, replaces what the file has.
    words = [
        w for w in config_arguments(on_line) if w.startswith(("--batch-tokens", "--hook-points", "--seed"))
    ]
    given = {
        f
        for f in ("batch_tokens", "hook_points", "seed")
        if any(w.startswith(f"--{f.replace('_', '-')}") for w in words)
    }
    expected = dataclasses.replace(in_file, **{f: getattr(on_line, f) for f in given})
    assert same(from_words(["--config", str(path), *words])[1], expected)


def test_every_field_has_an_option_and_a_line_of_help():
    names = [f.name for f in dataclasses.fields(IngestConfig)]
    assert list(config_fields()) == names
    assert sorted(ingest_options.HELP) == sorted(names)
    options = parser()._option_string_actions
    for name in names:
        assert "--" + name.replace("_", "-") in options
    assert parser().format_help()


def test_a_file_can_be_written_by_hand(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'store = "s3://b/s"   # where\ncorpus = "news"\nmodel = "m"\nhook_points = ["embed", "layers.{0..2}.mlp_out"]\n'
        'run = "r"\nray_address = "none"\ncommit_interval_s = 2\nrows_per_unit = "auto"\nkeep = ["dense", "pooled"]\n'
    )
    config = IngestConfig.from_toml(path)
    assert config.hook_points == ["embed", "layers.{0..2}.mlp_out"]
    assert config.ray_address is None
    assert isinstance(config.commit_interval_s, float)
    assert read_config_file(path).store == "s3://b/s"
    # A boolean that the file sets can be taken back on the line.
    path.write_text(path.read_text() + "compile = true\n")
    assert from_words(["--config", str(path)])[1].compile is True
    assert from_words(["--config", str(path), "--no-compile"])[1].compile is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hook_point = ['embed']", "unknown key 'hook_point': did you mean hook_points"),
        ("batch-tokens = 3", "did you mean batch_tokens"),
        ("zzz = 1", "the keys are corpus, model"),
        ("[ingest]\nrun = 'a'", "unknown key 'ingest'"),
        ("workers = '2'", r"workers in .* must be a whole number, got '2' \(str\)"),
        ("workers = true", r"workers in .* must be a whole number, got True \(bool\)"),
        ("workers = 2.0", "workers in .* must be a whole number"),
        ("rows_per_unit = 'many'", "rows_per_unit in .* must be a whole number or 'auto'"),
        ("compile = 1", "compile in .* must be true or false"),
        ("compile = 'yes'", "compile in .* must be true or false"),
        ("hook_points = 'embed'", "hook_points in .* must be a list of texts"),
        ("hook_points = ['embed', 3]", "hook_points in .* must be a list of texts"),
        ("sample = '0.1'", "sample in .* must be a number"),
        ("model = 3", "model in .* must be text"),
        ("store = 3", "store in .* must be text"),
        ("run = 2026-01-01", "run in .* must be text"),
        ("run = 'a'\nrun = 'b'", "not a TOML file"),
        ("run = ", "not a TOML file"),
        ("\xff".encode("latin-1"), "not a TOML file"),
    ],
)
def test_what_a_file_may_not_say(line, message):
    data = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(InvalidInputError, match=message):
        parse_config(data, name="run.toml")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(NotFoundError, match=r"no.toml' does not exist"):
        read_config_file(tmp_path / "no.toml")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_config_file(tmp_path)
    (tmp_path / "big").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InvalidInputError, match="more than") as caught:
        read_config_file(tmp_path / "big")
    assert caught.value.kind is ErrorKind.TOO_LARGE
    (tmp_path / "run.toml").write_text("run = 'r'")
    with pytest.raises(InvalidInputError, match="needs corpus, model, hook_points: give --corpus, --model"):
        IngestConfig.from_toml(tmp_path / "run.toml")
    with pytest.raises(InvalidInputError, match="no store was named"):
        from_words(["--config", str(tmp_path / "run.toml")])


def test_half_a_character_cannot_be_written():
    with pytest.raises(InvalidInputError, match="half a character"):
        IngestConfig("c", "\ud800", ["embed"], "r").to_toml()


def test_text_of_every_control_character_is_toml():
    text = "".join(map(chr, range(0xA0)))
    config = IngestConfig("c", text, ["embed"], "r")
    assert tomllib.loads(config.to_toml())["model"] == text


GOOD = {"corpus": "c", "model": "m", "hook_points": ["embed"], "run": "r"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_workers": 2}, "min_workers must be at most workers, which is 1, got 2"),
        ({"workers": 2, "ray_address": None}, "workers must be 1 without Ray"),
        ({"straggler_factor": 0.5}, "straggler_factor must be 0 for never, or a number above 1"),
        ({"straggler_factor": -1}, "straggler_factor"),
        ({"straggler_factor": 1}, "straggler_factor"),
        ({"straggler_factor": float("inf")}, "straggler_factor"),
        ({"sample": 0}, "sample must be a share above 0"),
        ({"sample": 1.5}, "sample"),
        ({"sample": float("nan")}, "sample"),
        ({"self_check": -0.1}, "self_check must be a share from 0 to 1"),
        ({"self_check": True}, "self_check"),
        ({"keep": []}, "keep must be a list"),
        ({"keep": "dense"}, "keep must be a list"),
        ({"keep": ["dense", "dense"]}, "keep must be a list of dense, pooled, codes, each once"),
        ({"keep": ["sparse"]}, "keep must be a list"),
        ({"keep": ["codes"]}, "dictionary must be a list of dictionaries where keep has codes"),
        ({"dictionary": ["sae"]}, "dictionary must be left out where no codes are kept"),
        ({"keep": ["codes"], "dictionary": ["a", "a"]}, "dictionary must be a list of names, each once"),
        (
            {"keep": ["codes"], "dictionary": ["a"], "self_check": 0.1},
            "self_check must be 0 where only codes are kept",
        ),
        ({"poolings": ["mean", "mean"], "keep": ["pooled"]}, "poolings must be .* each once"),
        ({"poolings": ["mean"]}, "poolings must be left out where nothing is pooled"),
        ({"pool_special": True}, "pool_special must be left out where nothing is pooled"),
        ({"keep": ["pooled"], "sample": 0.5}, "sample must be 1.0 where no dense rows are kept"),
        ({"keep": ["pooled"], "codec": "lz4"}, "codec must be hot where no dense rows are kept"),
        ({"keep": ["pooled"], "dtype": "int8"}, "dtype must be a floating-point type"),
        ({"dtype": "int8", "codec": "cold"}, "codec must be hot or lz4 with dtype int8"),
        ({"device_map": "auto", "device": "cuda:1"}, "device must be auto with device_map"),
        ({"compile": "yes"}, "compile must be true or false"),
        ({"covariance": 1}, "covariance must be true or false"),
        ({"gpus_per_worker": -1}, "gpus_per_worker"),
        ({"hook_points": [""]}, "hook_points"),
        ({"model": ""}, "model must be text"),
        ({"device_map": ""}, "device_map must be text, or left out"),
    ],
)
def test_settings_that_cannot_work_or_not_together(changes, message):
    IngestConfig(**GOOD).check()
    with pytest.raises(InvalidInputError, match=message):
        IngestConfig(**{**GOOD, **changes}).check()


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": ["pooled"], "poolings": ["mean"], "pool_special": True},
        {"keep": ["dense", "pooled"], "sample": 0.01, "dtype": "int8", "codec": "lz4"},
        {"straggler_factor": 0},
        {"straggler_factor": 1.5},
        {"device_map": "auto"},
        {"workers": 4, "min_workers": 4},
        {"self_check": 1},
    ],
)
def test_settings_that_work(changes):
    IngestConfig(**{**GOOD, **changes}).check()
