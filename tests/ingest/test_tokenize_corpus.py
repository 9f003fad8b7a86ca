"""Are the rows of a tokenization what the tokenizer says of each document, whoever computes them and however often?"""

import contextlib
import dataclasses
import json
import threading
import uuid
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.importing import import_corpus
from actstore.ingest.tokenization_plan import plan_tokenization
from actstore.ingest.tokenizers import load_tokenizer, vocabulary_table
from actstore.ingest.tokenizing import tokenize_corpus
from actstore.log import fsck
from actstore.log.commit import CommitLog
from actstore.log.values import Create, Seal
from actstore.objects import ObjectReader
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from actstore.tokenization import TOKEN_SCHEMA

TOPICS = [text for _, text in sorted(topics.items())][:40]
TEXTS = [
    *TOPICS[:12],
    "",
    "emoji 🎉👩‍👩‍👧🏳️‍🌈 and 漢字かな交じり文 and é e\u0301 a\u0308\u0323 ﬁ",
    "special <s> and [SEP] and </s> written in the text",
    " ",
    "\n\n\ttabs  and   spaces ",
    "עברית العربية हिन्दी ไทย",
    "x",
    *TOPICS[12:18],
    "",
]


def byte_level() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(TOPICS, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", pad_token="<pad>", model_max_length=64
    )


def word_piece() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(
        TOPICS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def unigram() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.NFKC()
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tok.train_from_iterator(TOPICS, trainer)
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


KINDS = {"byte-level": byte_level, "word-piece": word_piece, "unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = actstore.open(tmp_path / "store", create=True)
    import_corpus(store, "c", TEXTS, part_bytes=30_000)
    return store


def all_rows(store: Store, id: str) -> dict[str, list]:
    tokenization = store.refresh().tokenization(id)
    tables = [tokenization.unit_table(u.unit) for u in tokenization.units]
    return pa.concat_tables(tables).to_pydict()


def by_window(table: dict[str, list]) -> dict[tuple[int, int], list[dict]]:
    windows: dict[tuple[int, int], list[dict]] = {}
    for i in range(len(table["row"])):
        row = {name: column[i] for name, column in table.items()}
        windows.setdefault((row["doc_id"], row["window"]), []).append(row)
    return windows


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize(("window", "overlap"), [(100_000, 0), (16, 0), (16, 5)])
def test_rows_are_what_transformers_says_of_each_document(
    store, tokenizer, window, overlap, add_special_tokens
):
    report = tokenize_corpus(
        store, "c", tokenizer, window=window, overlap=overlap, add_special_tokens=add_special_tokens
    )
    found = by_window(all_rows(store, report.id))
    special_ids = set(tokenizer.all_special_ids)
    n_empty = 0
    for doc, text in enumerate(TEXTS):
        # The oracle is the windowing of transformers itself, one document at a time.
        whole = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if not whole:
            n_empty += 1
            assert (doc, 0) not in found
            continue
        cut = tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            truncation=True,
            max_length=window,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        n_windows = len(cut["input_ids"])
        assert (doc, n_windows) not in found
        for w in range(n_windows):
            rows = found.pop((doc, w))
            ids, template = cut["input_ids"][w], cut["special_tokens_mask"][w]
            assert [r["token_id"] for r in rows] == ids
            assert [r["window_position"] for r in rows] == list(range(len(ids)))
            assert [r["is_special"] for r in rows] == [
                bool(m) or i in special_ids for i, m in zip(ids, template, strict=True)
            ]
            spans = [(r["char_start"], r["char_end"]) for r in rows]
            assert [s for s, m in zip(spans, template, strict=True) if not m] == [
                tuple(o) for o, m in zip(cut["offset_mapping"][w], template, strict=True) if not m
            ]
            assert all(a == b for (a, b), m in zip(spans, template, strict=True) if m)
            assert spans == sorted(spans, key=lambda s: s[0])
            assert all(0 <= a <= b <= len(text) for a, b in spans)
            assert all(
                whole[r["position"]] == r["token_id"] for r, m in zip(rows, template, strict=True) if not m
            )
            positions = [r["position"] for r in rows]
            assert positions == sorted(positions)
        if overlap == 0 and n_windows == 1:
            assert positions == list(range(len(whole)))
    assert not found
    assert (report.n_empty, report.n_documents) == (n_empty, len(TEXTS))
    seal = store.tokenization(report.id).collection.seal
    assert (seal.meta["n_empty"], seal.meta["n_documents"]) == (n_empty, len(TEXTS))
    assert seal.meta["n_windows"] == report.n_windows


def test_units_number_rows_and_never_split_a_window(store, bpe):
    report = tokenize_corpus(store, "c", bpe, window=50, rows_per_unit=256)
    tokenization = store.refresh().tokenization(report.id)
    assert report.n_units == len(tokenization.units) > 20
    seen = set()
    for unit in tokenization.units:
        path = tokenization.objects.file(unit.objects[0])
        table = pq.read_table(path)
        assert table.schema.equals(TOKEN_SCHEMA)
        rows = table.to_pydict()
        assert rows["row"] == list(range(unit.unit * 256, unit.unit * 256 + unit.rows))
        windows = list(dict.fromkeys(zip(rows["doc_id"], rows["window"], strict=True)))
        assert not seen & set(windows)
        seen |= set(windows)
        assert unit.meta["n_windows"] == len(windows)
        assert (unit.meta["first_doc"], unit.meta["last_doc"]) == (windows[0][0], windows[-1][0])
        assert unit.rows <= 256 < unit.rows + 50 or unit.unit == report.n_units - 1
    assert tokenization.n_rows == report.n_rows == sum(u.rows for u in tokenization.units)
    assert fsck(store.storage, deep=True).is_clean


def test_characters_are_code_points_and_readable_tokens_are_their_text(store, bpe):
    report = tokenize_corpus(store, "c", bpe, window=32)
    rows = all_rows(store, report.id)
    vocabulary = store.tokenization(report.id).vocabulary()
    token = dict(zip(vocabulary["token_id"].to_pylist(), vocabulary["token"].to_pylist(), strict=True))
    covered = [set() for _ in TEXTS]
    for doc, id, a, b, special in zip(
        rows["doc_id"],
        rows["token_id"],
        rows["char_start"],
        rows["char_end"],
        rows["is_special"],
        strict=True,
    ):
        covered[doc] |= set(range(a, b))
        if not special and "\ufffd" not in token[id]:
            assert TEXTS[doc][a:b] == token[id]
    # A byte-level tokenizer without trimming accounts for every character.
    assert [len(c) for c in covered] == [len(t) for t in TEXTS]


def test_vocabularies_are_readable():
    shown = {}
    for name, make in KINDS.items():
        tokenizer = make()
        table = vocabulary_table(load_tokenizer(tokenizer)).to_pydict()
        assert table["token_id"] == sorted(tokenizer.get_vocab().values())
        shown[name] = dict(zip(table["token_id"], table["token"], strict=True))
    bpe = byte_level()
    for id, token in shown["byte-level"].items():
        assert token == bpe.backend_tokenizer.decode([id], skip_special_tokens=False)
    assert shown["byte-level"][0] == "<s>"
    assert " the" in shown["byte-level"].values()
    assert any(t.startswith("##") for t in shown["word-piece"].values())
    assert not any("▁" in t for t in shown["unigram"].values())
    assert any(t.startswith(" ") for t in shown["unigram"].values())


def test_vocabulary_of_byte_fallback_tokens():
    vocab = {"<unk>": 0, "▁a": 1, "<0x0A>": 2, "<0xE2>": 3, "▁▁": 4}
    tok = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens(["<unk>"])
    tokens = vocabulary_table(load_tokenizer(tok))["token"].to_pylist()
    assert tokens == ["<unk>", " a", "\n", "<0xE2>", "  "]


def contents(store: Store, id: str) -> list[tuple]:
    tokenization = store.refresh().tokenization(id)
    return [
        (u.unit, u.rows, dict(u.meta), u.objects[0].sha256, u.objects[0].nbytes) for u in tokenization.units
    ]


def test_workers_do_not_change_a_byte(store, bpe, tmp_path):
    alone = tokenize_corpus(store, "c", bpe, window=40, overlap=3, rows_per_unit=512)
    other = actstore.open(tmp_path / "other", create=True)
    import_corpus(other, "c", [{"text": t} for t in TEXTS], part_bytes=1_000)
    shared = tokenize_corpus(other, "c", bpe, window=40, overlap=3, rows_per_unit=512, workers=4)
    # The same documents in other parts are the same corpus, so even the ids are equal.
    assert shared.id == alone.id
    assert contents(other, shared.id) == contents(store, alone.id)


def test_finished_work_is_returned_as_it_is(store, bpe):
    first = tokenize_corpus(store, "c", bpe, rows_per_unit=2048)
    version = store.refresh().version
    again = tokenize_corpus(store, "c", bpe, rows_per_unit=2048)
    assert again == dataclasses.replace(first, n_new_units=0)
    assert (first.n_new_units, store.refresh().version) == (first.n_units, version)
    assert first.window == 64  # what the tokenizer says of its model
    other = tokenize_corpus(store, "c", bpe, window=32, rows_per_unit=2048)
    assert other.id != first.id
    assert plan_tokenization(store, "c", bpe, window=32, rows_per_unit=2048).id == other.id


def test_the_same_tokenizer_from_anywhere_is_one_tokenization(store, bpe, tmp_path):
    first = tokenize_corpus(store, "c", bpe)
    bpe.save_pretrained(tmp_path / "saved")
    changed = byte_level()
    changed.backend_tokenizer.enable_truncation(5)
    changed.backend_tokenizer.enable_padding(length=99)
    for source in (str(tmp_path / "saved"), tmp_path / "saved", changed, load_tokenizer(bpe)):
        report = tokenize_corpus(store, "c", source, window=64)
        assert (report.id, report.n_new_units) == (first.id, 0)
    stored = store.tokenization(first.id)
    backend = Tokenizer.from_str(stored.tokenizer_json().decode())
    assert (backend.truncation, backend.padding) == (None, None)
    assert backend.encode(TEXTS[0]).ids == bpe(TEXTS[0], verbose=False)["input_ids"]
    assert stored.tokenizer_config()["special_tokens"] == {"bos_token": "<s>", "pad_token": "<pad>"}
    bare = tokenize_corpus(store, "c", tmp_path / "saved" / "tokenizer.json", window=64)
    assert contents(store, bare.id) == contents(store, first.id)
    without_bos = byte_level()
    without_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    assert tokenize_corpus(store, "c", without_bos).id != first.id


def faulty(url: Path, plan: dict[int, Fault]) -> tuple[Store, FaultStorage]:
    inner = actstore.open(url)
    storage = FaultStorage(inner.storage, plan)
    log = CommitLog(storage, sleep=lambda seconds: None)
    objects = ObjectReader(storage, cache_dir=None, cache_bytes=0)
    return Store(storage, inner.state, log=log, objects=objects), storage


def test_a_tokenization_that_dies_at_any_write_goes_on_where_it_was(tmp_path, bpe):
    arguments = {"window": 40, "overlap": 2, "rows_per_unit": 1_500, "units_per_commit": 2}
    texts = [t[:3_000] for t in TEXTS]

    def make() -> Path:
        url = tmp_path / uuid.uuid4().hex
        import_corpus(url, "c", texts)
        return url

    counting, storage = faulty(make(), {})
    id = tokenize_corpus(counting, "c", bpe, **arguments).id
    expected = contents(counting, id)
    seal = counting.tokenization(id).collection.seal.meta
    writes = [i for i, (name, _) in enumerate(storage.operations) if name == "put_new"]
    assert len(expected) >= 6
    for mode in (Fault.KILL_BEFORE, Fault.KILL_AFTER):
        # Writer threads may swap neighbouring operations; every write is hit by some index all the same.
        for operation in writes:
            url = make()
            store, _ = faulty(url, {operation: mode})
            with contextlib.suppress(Killed):
                tokenize_corpus(store, "c", bpe, **arguments)
            fresh = actstore.open(url)
            known = fresh.state.collections.get(("tokenization", id))
            done = 0 if known is None else len(known.units)
            assert done % 2 == 0 or done == len(expected)
            report = tokenize_corpus(fresh, "c", bpe, **arguments)
            assert report.n_new_units == len(expected) - done
            assert contents(fresh, id) == expected
            assert fresh.tokenization(id).collection.seal.meta == seal


def test_two_processes_at_once_make_one_tokenization(tmp_path, bpe):
    url = tmp_path / "s"
    import_corpus(url, "c", TEXTS)
    reports, errors = [], []

    def work() -> None:
        try:
            reports.append(tokenize_corpus(url, "c", bpe, rows_per_unit=512, units_per_commit=1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({r.id for r in reports}) == 1
    single = actstore.open(tmp_path / "single", create=True)
    import_corpus(single, "c", TEXTS)
    tokenize_corpus(single, "c", bpe, rows_per_unit=512)
    assert contents(actstore.open(url), reports[0].id) == contents(single, reports[0].id)
    assert fsck(single.storage, deep=False).is_clean


def test_tokenizers_that_cannot_be_used(store, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refused(tokenizer, match: str, **arguments) -> None:
        with pytest.raises(InvalidInputError, match=match) as caught:
            tokenize_corpus(store, "c", tokenizer, window=64, **arguments)
        assert caught.value.kind is ErrorKind.BAD_TOKENIZER

    refused(transformers.ByT5Tokenizer(), "is not a fast one.*tokenizer.json")
    refused(object(), "is not a fast one")
    refused(tmp_path / "nowhere", "no tokenizer could be loaded")
    refused("no-such-org/no-such-model", "no tokenizer could be loaded")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no tokenizer could be loaded")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path / "tokenizer.json", "no tokenizer could be loaded")
    word_level = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    refused(word_level, "cannot encode.*unknown token")
    assert store.refresh().tokenizations() == []


def test_tokenizers_that_would_drop_characters_are_refused(tmp_path):
    # tokenizers gives the tokens behind a dropped character offsets that are too small: this is why.
    tok = Tokenizer(models.BPE({"e": 0, "t": 1, "te": 2}, [("t", "e")]))
    assert tok.encode("a te").offsets == [(0, 2)]
    store = actstore.open(tmp_path / "s", create=True)
    import_corpus(store, "known", ["te", "", "ette"])
    import_corpus(store, "unknown", ["te", "a te é"])
    report = tokenize_corpus(store, "known", tok, window=64)
    rows = all_rows(store, report.id)
    assert list(zip(rows["doc_id"], rows["token_id"], strict=True)) == [(0, 2), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(InvalidInputError, match="no symbol for ' ', 'a', 'é' in document 1") as caught:
        tokenize_corpus(store, "unknown", tok, window=64)
    assert caught.value.kind is ErrorKind.BAD_TOKENIZER
    bytes_seen = byte_level_of(["te e t"])
    tokenize_corpus(store, "known", bytes_seen, window=64)
    with pytest.raises(
        InvalidInputError, match="no symbol for byte 0x61, byte 0xa9, byte 0xc3 in document 1"
    ):
        tokenize_corpus(store, "unknown", bytes_seen, window=64)


def byte_level_of(texts: list[str]) -> Tokenizer:
    """A byte-level tokenizer that knows the bytes of some texts only, as one trained without initial_alphabet does."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=50, show_progress=False))
    return tok


def test_a_corpus_without_any_token_is_refused(tmp_path, bpe):
    store = actstore.open(tmp_path / "s", create=True)
    import_corpus(store, "c", ["", ""])
    with pytest.raises(InvalidInputError, match="no document of corpus 'c' has a token"):
        tokenize_corpus(store, "c", bpe, add_special_tokens=False)
    assert store.refresh().tokenizations() == []
    # With the tokenizer's own special tokens, a document without text is still what the model would be given.
    report = tokenize_corpus(store, "c", bpe)
    assert (report.n_rows, report.n_empty, report.n_windows) == (2, 0, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 1},
        {"window": 0},
        {"overlap": 63},
        {"overlap": -1},
        {"rows_per_unit": 63},
        {"workers": -1},
        {"units_per_commit": 0},
        {"units_per_commit": 513},
    ],
)
def test_settings_that_cannot_work(store, bpe, arguments):
    with pytest.raises(InvalidInputError) as caught:
        tokenize_corpus(store, "c", bpe, **arguments)
    assert caught.value.kind is ErrorKind.BAD_ARGUMENT
    assert store.refresh().tokenizations() == []


def test_missing_stores_and_corpora(store, tmp_path, bpe):
    with pytest.raises(NotFoundError, match="corpus"):
        tokenize_corpus(store, "d", bpe)
    with pytest.raises(NotFoundError):
        tokenize_corpus(tmp_path / "elsewhere", "c", bpe)


def test_long_documents_and_progress_are_told_quietly(store, bpe, capfd, caplog):
    told = []
    tokenize_corpus(store, "c", bpe, rows_per_unit=512, progress=told.append)
    assert [p.done for p in told] == sorted(p.done for p in told)
    # The last two documents with tokens end the last unit; the very last is empty but has its special token.
    assert (told[-1].done, told[-1].total, told[-1].unit) == (len(TEXTS), len(TEXTS), "documents")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_commands(tmp_path, bpe, capsys):
    from actstore.cli import main

    bpe.save_pretrained(tmp_path / "tok")
    url, source = str(tmp_path / "s"), tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS)))
    assert main(["import", url, "c", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_documents"] == len(TEXTS)
    assert main(["import", url, "c", str(source)]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main(["import", url, "d", str(source), "--text-column", "body"]) == 2
    assert "no text column 'body' among 'text', 'n'" in capsys.readouterr().err
    assert (
        main(["tokenize", url, "c", "--tokenizer", str(tmp_path / "tok"), "--rows-per-unit", "512", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["window"], report["rows_per_unit"], report["n_documents"]) == (64, 512, len(TEXTS))
    assert main(["tokenize", url, "c", "--tokenizer", str(tmp_path / "tok"), "--rows-per-unit", "512"]) == 0
    assert "(0 new)" in capsys.readouterr().out


def test_another_tokenization_under_the_same_id_is_never_taken_for_this_one(tmp_path, bpe):
    """Ids hold 40 bits of the hash: one that two configurations share is refused, not answered."""
    url = tmp_path / "s"
    import_corpus(url, "c", TEXTS[:3])
    twin = tmp_path / "twin"
    import_corpus(twin, "c", TEXTS[:3])
    id = tokenize_corpus(twin, "c", bpe, window=32).id
    store = actstore.open(url)
    store.log.commit(
        [Create("tokenization", id, {"other": 1}, {}), Seal("tokenization", id, 0, 0, 0, (), {})],
        txn="collision",
    )
    with pytest.raises(ConflictError) as caught:
        tokenize_corpus(store, "c", bpe, window=32)
    assert caught.value.kind is ErrorKind.CONFIG_DIFFERS
