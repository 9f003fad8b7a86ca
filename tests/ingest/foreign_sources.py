"""Activations as other programs write them, made from random numbers, and tokenizers of the kinds that there are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import actstore

TEXTS = (
    "The naïve café sold 漢字 and 🎉 to many people.",
    "Words, words; don't stop: 3.14 is π. Ünïcode ☃ everywhere!",
    "plain ascii text with nothing special in it at all",
)


def byte_level(**options) -> Tokenizer:
    """GPT-2's kind: a character of several bytes may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "<|end of text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **options,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama's kind: bytes as tokens of their own where a character is unknown, and a space before the first word."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for piece in ("▁", "▁the", "▁naï", "ve", "a", "b", "c", "d", "e", "▁w", "or", "ds", "漢", "▁🎉", "!"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's kind: pieces with ##, and a decoder that puts spaces and takes some away before punctuation."""
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "do",
        "n",
        "'",
        "t",
        "##ing",
        "##s",
        "word",
        "naïve",
        ",",
        ".",
        "?",
        "stop",
    ]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def word_ends() -> Tokenizer:
    """The first GPT's kind: its decoder treats the last token unlike those before it."""
    words = ["<unk>", "low</w>", "lo", "w</w>", "est</w>", "new", "é</w>", "漢</w>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
    "word_ends": word_ends,
}


def random_documents(rng, n: int, vocab: int, longest: int) -> list[np.ndarray]:
    return [rng.integers(0, vocab, int(rng.integers(1, longest + 1))).astype(np.int32) for _ in range(n)]


def write_saelens(folder: Path, column: str, acts: np.ndarray, ids: np.ndarray, *, n_files: int = 2) -> Path:
    """Write contexts (n, ctx, d) and ids (n, ctx) in the layout of `CacheActivationsRunner`."""
    import datasets

    _, ctx, width = acts.shape
    features = datasets.Features(
        {
            column: datasets.Array2D(shape=(ctx, width), dtype=str(acts.dtype)),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=ctx),
        }
    )
    dataset = datasets.Dataset.from_dict({column: acts, "token_ids": ids}, features=features)
    dataset.save_to_disk(str(folder), num_shards=n_files)
    return folder


def write_vllm(folder: Path, documents: Sequence[np.ndarray], states: Sequence) -> Path:
    """Write one file per request; `states` are torch tensors [tokens, layers, d]."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for i, (ids, hidden) in enumerate(zip(documents, states, strict=True)):
        save_file(
            {"hidden_states": hidden, "token_ids": torch.tensor(ids.astype(np.int64))},
            folder / f"hs_{i}.safetensors",
        )
    return folder


def token_columns(documents: Sequence[np.ndarray], **more) -> dict[str, np.ndarray]:
    return {
        "doc_id": np.repeat(np.arange(len(documents)), [len(d) for d in documents]),
        "token_id": np.concatenate(documents),
        **more,
    }


def write_table(path: Path, columns: Mapping) -> Path:
    table = pa.table(dict(columns))
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=100)
    elif path.suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
    return path


def stored(store: str, run: str, hook_point: str) -> tuple[pa.Table, np.ndarray]:
    """All token rows of a run, and the stored bits of their activations, read through zarr-python."""
    import zarr

    opened = actstore.open(store)
    found = opened.run(run)
    assert found.is_complete
    tokens = pa.concat_tables([found.tokenization.unit_table(u.unit) for u in found.tokenization.units])
    array = zarr.open_array(f"{store}/{found.array_path(hook_point)}", mode="r")
    return tokens, array[:][tokens["row"].to_numpy()]
