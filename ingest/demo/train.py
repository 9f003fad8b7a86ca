"""How does the demo get language models without a network?

It trains them: one byte-level BPE tokenizer and small GPT-NeoX models that differ in their seed alone, saved as any
Hugging Face model is (safetensors, `AutoModelForCausalLM.from_pretrained`). The number of steps is fixed, so a seed
gives one model on one machine. A model's folder appears whole or not at all.
"""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actstore.errors import ErrorKind, InvalidInputError

BOUNDARY = "<|endoftext|>"
"""The one special token: stands before every document, as beginning, end and padding."""

REPORT_FILE = "demo_training.json"

_INITIAL_WEIGHTS = threading.Lock()
"""Initial weights come from torch's global random state: one model at a time."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What decides a demo model: shape, data order and number of steps.

    The defaults take about 115 s for two models on two quiet cores. Of the shapes tried at equal time (2 to 4 layers,
    widths 96 and 128, GPT-2, Llama and GPT-NeoX), this one had the lowest held-out loss with a layer in the middle.
    """

    seed: int
    """Of the initial weights and of the order of the windows."""
    steps: int = 800
    """Optimiser steps."""
    batch_windows: int = 8
    """Windows per step; smaller wastes the cores, larger makes too few steps."""
    window: int = 128
    """Tokens the model sees at once; also its context length."""
    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 512
    """Neurons per layer."""
    layers: int = 3
    """Number of layers."""
    heads: int = 4
    """Attention heads per layer."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule; 7e-3 and more ended 0.2 nats higher."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What came out of one training, in nats per token."""

    n_parameters: int
    n_trained_tokens: int
    """Tokens that went through the model: steps times tokens per batch."""
    first_loss: float
    """Training loss of the first step: about ln(vocabulary)."""
    held_out_loss: float
    """Mean loss on documents that the model was not trained on."""
    unigram_loss: float
    """The same for a model that knows only how frequent each token is."""
    seconds: float


def make_tokenizer(texts: Iterable[str], *, vocab_size: int, window: int) -> Any:
    """A byte-level BPE tokenizer learned from `texts`, as a `PreTrainedTokenizerFast`.

    It puts `BOUNDARY` before every text. Any text encodes: all 256 bytes are in the vocabulary.

    Raises:
        InvalidInputError: `vocab_size` has no room for the 256 bytes and `BOUNDARY`.
    """
    if vocab_size < 257:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"vocab_size must be at least 257 (256 bytes and {BOUNDARY}), got {vocab_size!r}",
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    boundary_id = tokenizer.token_to_id(BOUNDARY)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, boundary_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=BOUNDARY,
        model_max_length=window,
    )


def encode_stream(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Token ids of all texts one after the other, each after its `BOUNDARY`; int64, shape (t,)."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=True)
    return np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])


def unigram_loss(trained_t: np.ndarray, held_out_t: np.ndarray, *, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of held-out tokens under the frequencies of the trained ones plus one.

    >>> unigram_loss(np.array([0, 0]), np.array([0]), vocab_size=2) == -math.log(3 / 4)
    True
    """
    counts = np.bincount(trained_t, minlength=vocab_size).astype(np.float64) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[held_out_t]))


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine down to a twentieth.

    >>> [round(learning_rate_factor(s, steps=101, warmup_steps=4), 3) for s in (0, 3, 4, 52, 100)]
    [0.25, 1.0, 1.0, 0.525, 0.05]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_model(
    trained_t: np.ndarray,
    held_out_t: np.ndarray,
    *,
    vocab_size: int,
    boundary_id: int,
    config: TrainConfig,
    on_step: Callable[[int, float], None],
) -> tuple[Any, TrainReport]:
    """A trained `GPTNeoXForCausalLM` in float32 on the CPU, and what it reached.

    `on_step(step, loss)` is called after every step; an exception it raises ends the training. Several may run at a time,
    one a thread. The global random state is as before afterwards.

    Raises:
        InvalidInputError: fewer tokens than one window.
    """
    import torch

    for what, ids in (("training", trained_t), ("held-out", held_out_t)):
        if len(ids) < config.window:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"a demo model needs at least one window of {config.window} {what} tokens, got {len(ids)}; add text",
            )
    started = time.monotonic()
    with _INITIAL_WEIGHTS, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _make_model(vocab_size, boundary_id, config)
    first_loss = math.nan
    for step, loss in enumerate(_train_steps(model, torch.from_numpy(trained_t), config)):
        first_loss = loss if step == 0 else first_loss
        on_step(step, loss)
    held_out = _held_out_loss(model, torch.from_numpy(held_out_t), config)
    return model, TrainReport(
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_trained_tokens=config.steps * config.batch_windows * config.window,
        first_loss=first_loss,
        held_out_loss=held_out,
        unigram_loss=unigram_loss(trained_t, held_out_t, vocab_size=vocab_size),
        seconds=round(time.monotonic() - started, 1),
    )


def save_model(
    folder: Path, model: Any, tokenizer: Any, *, config: TrainConfig, text_sha256: str, report: TrainReport
) -> None:
    """Write model, tokenizer and report to `folder`, which is replaced whole, last of all by a rename."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    about = {"config": asdict(config), "text_sha256": text_sha256, "report": asdict(report)}
    (partial / REPORT_FILE).write_text(json.dumps(about, indent=1, sort_keys=True))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def saved_report(folder: Path, *, config: TrainConfig, text_sha256: str) -> TrainReport | None:
    """What the model in `folder` reached, or None if it is not there or was trained on other text or otherwise."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    about = json.loads(path.read_text())
    if about["config"] != asdict(config) or about["text_sha256"] != text_sha256:
        return None
    return TrainReport(**about["report"])


def _make_model(vocab_size: int, boundary_id: int, config: TrainConfig) -> Any:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    model_config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.window,
        rotary_pct=1.0,
        use_parallel_residual=False,  # attention, then MLP: every hook point exists
        tie_word_embeddings=True,
        bos_token_id=boundary_id,
        eos_token_id=boundary_id,
        pad_token_id=boundary_id,
    )
    return AutoModelForCausalLM.from_config(model_config, attn_implementation="sdpa")


def _train_steps(model: Any, trained_t: Any, config: TrainConfig) -> Iterator[float]:
    """Losses of the steps: AdamW on windows drawn at random from the stream."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    windows_nt = trained_t.unfold(0, config.window, 1)
    order = torch.Generator().manual_seed(config.seed)
    model.train()
    for step in range(config.steps):
        factor = learning_rate_factor(step, steps=config.steps, warmup_steps=config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        batch_bt = windows_nt[torch.randint(len(windows_nt), (config.batch_windows,), generator=order)]
        loss = model(input_ids=batch_bt, labels=batch_bt).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(loss.detach())
    model.eval()


def _held_out_loss(model: Any, held_out_t: Any, config: TrainConfig) -> float:
    """Mean loss over whole windows of the held-out stream; the rest after the last window is left out."""
    import torch

    windows_bt = held_out_t.unfold(0, config.window, config.window)
    total = 0.0
    with torch.inference_mode():
        for batch_bt in windows_bt.split(32):
            total += float(model(input_ids=batch_bt, labels=batch_bt).loss) * len(batch_bt)
    return total / len(windows_bt)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let every training use one core.

    Two models side by side are as fast as one after the other on two threads, and do not spin at barriers when other
    programs need the cores.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
