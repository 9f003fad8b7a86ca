"""What happens in `actstore demo`, step by step?

Each step can be repeated: models that are there are used, a corpus or run that is there is left as it is, one that is not
finished is finished. The questions are asked through `actstore.Store` and `actstore.Run` alone, as a user asks them.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import actstore
from actstore._lazy import lazy_import
from actstore.errors import NotFoundError
from actstore.ingest.config import IngestConfig
from actstore.ingest.importing import import_corpus
from actstore.ingest.job import run_ingest
from actstore.ingest.training import SaeTrainConfig

from . import show
from .ask import ask_direction, ask_nearest, ask_neurons, ask_sql, index_stream, middle_stream
from .corpus import Bounds, Document, read_documents, stored_documents
from .sae import show_latents
from .train import (
    TrainConfig,
    TrainReport,
    encode_stream,
    make_tokenizer,
    one_thread_each,
    save_model,
    saved_report,
    train_model,
)

CORPUS = "python-docs"
HOOK_POINTS = ("layers.*.resid_post", "layers.*.mlp_act")

SAE = SaeTrainConfig(name="sae", n_latents=1024, k=16, n_rows=1_000_000, batch_rows=1024, learning_rate=2e-3)
"""Eight times as many latents as the stream is wide, eight times over the stored rows: about 15 s on one core."""


@dataclass(frozen=True, slots=True)
class TourConfig:
    """How large the demo is."""

    bounds: Bounds = field(default_factory=Bounds)
    modules: Collection[str] | None = None
    """Modules of the standard library to read; None for all that the demo knows."""
    vocab_size: int = 2048
    """Tokens; more make the output layer, a quarter of the work already, the largest part of it."""
    models: dict[str, TrainConfig] = field(
        default_factory=lambda: {"tiny-a": TrainConfig(seed=0), "tiny-b": TrainConfig(seed=1)}
    )
    """Run name to training: the runs differ in their model's seed."""
    ray_address: str | None = "local"
    """None ingests in this process."""
    sae: SaeTrainConfig = SAE
    """The sparse autoencoder that is trained on the first run."""


def run_tour(store_path: Path, config: TourConfig, console: Console) -> dict[str, Any]:
    """Show everything, and return what was shown as values for JSON.

    Makes `store_path`, `<store_path>.models` and the pictures `<store_path>.latents.png` and `.html` where they are not.
    """
    started = time.monotonic()
    models_path = store_path.with_name(store_path.name + ".models").resolve()
    summary: dict[str, Any] = {"store": str(store_path), "models": str(models_path)}

    show.heading(console, 1, "A corpus: text that ships with Python")
    documents = read_documents(config.bounds, config.modules)
    summary["corpus"] = _describe_corpus(console, documents, config.bounds)

    show.heading(console, 2, "Two tiny language models, trained here, that differ in their seed")
    summary["training"] = _train_models(console, models_path, documents, config)

    show.heading(console, 3, "Import, tokenize and ingest" + (" with Ray" if config.ray_address else ""))
    store = actstore.open(store_path, create=True)
    summary["ingest"] = _ingest(console, store, models_path, documents, config)
    runs = [store.run(name) for name in config.models]

    show.heading(console, 4, "SQL over runs, documents and tokens")
    summary["sql"] = ask_sql(console, store)

    show.heading(console, 5, "Examples: the contexts that most activate a neuron, or any direction")
    summary["neurons"] = ask_neurons(console, store, runs[0])
    summary["direction"] = ask_direction(console, store, runs[0])

    show.heading(console, 6, "Nearest: the stored contexts most like a token, or like a text")
    summary["index"] = index_stream(console, store, runs[0].id)
    runs = [store.run(name) for name in config.models]
    summary["nearest"] = ask_nearest(console, store, runs)

    show.heading(console, 7, "Latents: a sparse autoencoder of the stream, and what fires in it")
    asked = replace(config.sae, checkpoint_dir=str(models_path / "sae.checkpoint"))
    beside = store_path.with_name(store_path.name + ".latents")
    summary["sae"] = show_latents(console, store, runs[0].id, middle_stream(runs[0]), asked, beside=beside)

    show.heading(console, 8, "Where things are, and what to try next")
    _say_goodbye(console, store_path, models_path, summary)
    return {**summary, "version": store.version, "seconds": round(time.monotonic() - started, 1)}


def _describe_corpus(console: Console, documents: Sequence[Document], bounds: Bounds) -> dict[str, int]:
    stored = stored_documents(documents, bounds)
    counts = {
        "n_documents": len(documents),
        "n_chars": sum(len(document.text) for document in documents),
        "n_held_out": sum(document.is_held_out for document in documents),
        "n_stored": len(stored),
        "n_stored_chars": sum(len(document.text) for document in stored),
    }
    show.line(
        console,
        f"{counts['n_documents']:,} documents ({counts['n_chars']:,} characters): the language reference, docstrings and "
        f"functions of the standard library. {counts['n_held_out']:,} are held out of training; "
        f"{counts['n_stored']:,} go into the store, held-out ones first.",
    )
    return counts


def _train_models(
    console: Console, folder: Path, documents: Sequence[Document], config: TourConfig
) -> dict[str, dict[str, Any]]:
    trained = [document.text for document in documents if not document.is_held_out]
    held_out = [document.text for document in documents if document.is_held_out]
    text_sha256 = _digest([str(config.vocab_size), *trained, "", *held_out])
    reports: dict[str, TrainReport] = {}
    for name, training in config.models.items():
        report = saved_report(folder / name, config=training, text_sha256=text_sha256)
        if report is not None:
            show.line(console, f"{name}: trained before, in {folder / name}")
            reports[name] = report
    missing = {name: training for name, training in config.models.items() if name not in reports}
    if missing:
        window = next(iter(missing.values())).window
        tokenizer = make_tokenizer(trained, vocab_size=config.vocab_size, window=window)
        streams = encode_stream(tokenizer, trained), encode_stream(tokenizer, held_out)
        folder.mkdir(parents=True, exist_ok=True)
        for name, model, report in _train_side_by_side(console, tokenizer, streams, missing):
            save_model(
                folder / name,
                model,
                tokenizer,
                config=missing[name],
                text_sha256=text_sha256,
                report=report,
            )
            reports[name] = report
    for name in config.models:
        _say_report(console, name, reports[name])
    return {name: asdict(reports[name]) for name in config.models}


def _train_side_by_side(
    console: Console, tokenizer: Any, streams: tuple[Any, Any], models: Mapping[str, TrainConfig]
) -> list[tuple[str, Any, TrainReport]]:
    """Train all models at once, a thread each, with a bar each; an interrupt stops them at their next step."""
    stop = threading.Event()

    def train(name: str, training: TrainConfig, show_step: Callable[[str, int, float], None]) -> Any:
        def on_step(step: int, loss: float) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            show_step(name, step, loss)

        return train_model(
            *streams,
            vocab_size=len(tokenizer),
            boundary_id=tokenizer.bos_token_id,
            config=training,
            on_step=on_step,
        )

    with (
        one_thread_each(),
        _training_bars(console, models) as show_step,
        ThreadPoolExecutor(len(models)) as pool,
    ):
        futures = {name: pool.submit(train, name, models[name], show_step) for name in models}
        try:
            return [(name, *future.result()) for name, future in futures.items()]
        finally:
            stop.set()


def _say_report(console: Console, name: str, report: TrainReport) -> None:
    show.line(
        console,
        f"{name}: {report.n_parameters:,} parameters, {report.n_trained_tokens:,} tokens in {report.seconds:.0f} s; loss "
        f"{report.first_loss:.2f} nats a token at first, {report.held_out_loss:.2f} on held-out text in the end (token "
        f"frequencies alone give {report.unigram_loss:.2f})",
    )


@contextmanager
def _training_bars(
    console: Console, models: Mapping[str, TrainConfig]
) -> Iterator[Callable[[str, int, float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps · loss {task.fields[loss]} ·"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=config.steps, loss="-") for name, config in models.items()}
        yield lambda name, step, loss: bars.update(tasks[name], completed=step + 1, loss=f"{loss:.2f}")


def _ingest(
    console: Console,
    store: actstore.Store,
    models_path: Path,
    documents: Sequence[Document],
    config: TourConfig,
) -> dict[str, Any]:
    stored = stored_documents(documents, config.bounds)
    imported = import_corpus(store, CORPUS, [document.record() for document in stored], id_column="id")
    state = "imported" if imported.is_new else "there already"
    show.line(
        console, f"corpus {CORPUS}: {imported.n_documents:,} documents, {imported.n_bytes:,} bytes, {state}"
    )
    missing = [name for name in config.models if not _is_complete(store, name)]
    reports = {}
    with _one_ray(console, config.ray_address if missing else None) as address:
        for name in config.models:
            asked = IngestConfig(
                corpus=CORPUS,
                model=str(models_path / name),
                hook_points=HOOK_POINTS,
                run=name,
                dtype="bf16",
                ray_address=address if name in missing else None,
            )
            report = run_ingest(store, asked)
            reports[name] = {**asdict(report), "was_complete": name not in missing}
            speed = "complete already" if name not in missing else f"{report.rows_per_s:,.0f} tokens/s"
            show.line(
                console,
                f"run {name}: {report.n_rows:,} token rows of {len(store.run(name).hook_points)} hook points in "
                f"{report.n_units} units, {report.nbytes / 1e6:,.0f} MB, {speed}",
            )
    return {"import": asdict(replace(imported, renamed={})), "runs": reports}


@contextmanager
def _one_ray(console: Console, address: str | None) -> Iterator[str | None]:
    """One local Ray for both runs: an ingest alone would start its own."""
    if address != "local":
        yield address
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run` Ray would otherwise build an environment for every worker, from the network.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray = lazy_import("ray", needed_for="the demo's ingest", extra="ingest")
    started = time.monotonic()
    ours = not ray.is_initialized()
    if ours:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        show.line(console, f"started Ray on this machine in {time.monotonic() - started:.0f} s")
    try:
        yield address
    finally:
        if ours:
            ray.shutdown()


def _is_complete(store: actstore.Store, name: str) -> bool:
    try:
        return store.run(name).is_complete
    except NotFoundError:
        return False


def _say_goodbye(console: Console, store_path: Path, models_path: Path, summary: dict[str, Any]) -> None:
    show.line(console, f"store: {store_path}   models: {models_path} (plain Hugging Face folders)")
    run, neurons = next(iter(summary["training"])), summary["neurons"]
    target = (
        f"neuron:{neurons[0]['hook_point']}:{neurons[0]['neuron']}"
        if neurons
        else "neuron:layers.1.mlp_act:7"
    )
    latents = summary["sae"]["latents"]
    latent = f"latent:{summary['sae']['dictionary']}:{latents[0]['latent'] if latents else 0}"
    for command in (
        f"actstore runs {store_path}",
        f"actstore info {store_path} {run}",
        f"actstore examples {store_path} {run} {target} -k 10",
        f"actstore examples {store_path} {run} {latent} -k 10",
        f"actstore neighbours {store_path} {run} {latent} --by coactivation",
        f"actstore latents {store_path} {run} {summary['sae']['dictionary']} --where 'density < 0.01' -k 10",
        f"actstore nearest {store_path} {run} layers.1.resid_post --text 'import os'",
        f"actstore knn-lm {store_path} {run} --text 'import os'",
        f"actstore index list {store_path}",
        f'actstore sql {store_path} "SELECT kind, count(*) AS n FROM documents GROUP BY kind"',
        f"actstore fsck {store_path} --deep",
    ):
        show.line(console, f"  {command}", style="cyan")
    show.line(console, "The demo can be run again: models and runs that are there are used as they are.")


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
