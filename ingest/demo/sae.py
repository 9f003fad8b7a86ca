"""What does the demo show of sparse autoencoders? One is trained, the run is encoded with it, and its latents are asked.

Dictionary, codes and postings that are there are left as they are. The pictures are drawn from what is stored, and written
again only where they differ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import actstore
from actstore._lazy import lazy_import
from actstore.ingest.encoding.encode import encode
from actstore.ingest.training import SaeTrainConfig, SaeTrainReport, TrainProgress, train_sae
from actstore.save_file import save_file

from . import show
from .facts import read_facts
from .latents import CRITERION, choose_latents, short
from .neurons import Story
from .train import one_thread_each

_SHOWN = 3
"""Contexts of each latent in the terminal."""

_ON_PAGE = 12
"""Contexts of each latent on the page."""


def show_latents(
    console: Console,
    store: actstore.Store,
    run_name: str,
    hook_point: str,
    config: SaeTrainConfig,
    *,
    beside: Path,
) -> dict[str, Any]:
    """Train, encode, choose latents, show them, save a picture and a page; return what was shown as values for JSON.

    Args:
        console: Where to.
        store: The demo's; moved to the version that has all of it.
        run_name: The run to train on and to encode.
        hook_point: Of its residual stream.
        config: Of the training.
        beside: Path of the pictures without their endings.
    """
    report = _train(console, store, run_name, hook_point, config)
    encoded = encode(store, config.name, run_name)
    state = (
        "encoded before"
        if not encoded.rows_this_job
        else f"{encoded.n_rows / max(encoded.elapsed_s, 1e-9):,.0f} rows/s"
    )
    show.line(
        console,
        f"encoded {encoded.n_rows:,} rows: {encoded.n_codes:,} codes in {encoded.nbytes / 1e6:,.1f} MB, {state}; then postings "
        "and exact statistics of every latent",
    )
    run = store.run(run_name)
    stories = choose_latents(run, config.name, read_facts(store, run))
    found = _show_stories(console, run, config.name, stories)
    files = _save_pictures(console, run, config.name, stories, beside)
    return {
        "dictionary": config.name,
        "training": [one.to_json() for one in report.hook_points],
        "codes": {k: v for k, v in asdict(encoded).items() if k in ("codes", "n_rows", "n_codes", "nbytes")},
        "criterion": CRITERION,
        "latents": found,
        "files": files,
    }


def _train(
    console: Console, store: actstore.Store, run_name: str, hook_point: str, config: SaeTrainConfig
) -> SaeTrainReport:
    # On one thread the same dictionary comes out every time, and other programs are not waited for at every step.
    with one_thread_each(), _training_bar(console, config.name) as progress:
        report = train_sae(store, run_name, hook_point, config, progress=progress)
    [found] = report.hook_points
    speed = f"in {report.elapsed_s:.0f} s" if report.steps_this_job else "trained before"
    loss = (
        ""
        if found.loss is None
        else f", {found.loss.recovered:.1%} of the model's loss recovered when put in its place"
    )
    show.line(
        console,
        f"{found.dictionary}: {config.n_latents:,} latents on {run_name} {hook_point}, {found.n_trained_rows:,} rows {speed}; on "
        f"{'held-out' if found.is_held_out else 'its own'} rows {found.explained_variance:.1%} of the variance explained by "
        f"{found.l0:.1f} latents each{loss}; {found.dead_share:.1%} dead",
    )
    return report


@contextmanager
def _training_bar(console: Console, name: str) -> Iterator[Callable[[TrainProgress], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps · unexplained {task.fields[fvu]} ·"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(name, total=None, fvu="-")

        def step(progress: TrainProgress) -> None:
            fvu = next(iter(progress.latest.values())).fvu
            bars.update(task, total=progress.n_steps, completed=progress.steps_done, fvu=f"{fvu:.0%}")

        yield step


def _show_stories(
    console: Console, run: actstore.Run, dictionary: str, stories: Sequence[Story]
) -> list[dict[str, Any]]:
    """Show every latent with what its strongest tokens have in common, and its first contexts."""
    if not stories:
        show.line(console, f"No latent {CRITERION}: model or dictionary were trained for too few steps")
        return []
    show.line(console, f"Each of these latents {CRITERION}:")
    numbers = [story.neuron for story in stories]
    densities = dict(
        zip(numbers, run.codes(dictionary).stats(numbers, ["density"])["density"].to_pylist(), strict=True)
    )
    targets = {number: actstore.latent(dictionary, number) for number in numbers}
    answer = run.examples(list(targets.values()), k=_SHOWN, fold="doc", before=12, after=5)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in answer:
        rows.setdefault(row["target"], []).append(row)
    found = []
    for story in stories:
        says = story.sentence(quote=show.quote)
        contexts = rows.get(targets[story.neuron].label, [])
        console.print()
        show.line(console, f"latent {story.neuron}: {says}", style="bold")
        show.contexts(console, contexts)
        density = densities[story.neuron]
        found.append({"latent": story.neuron, "says": says, "density": density, "examples": contexts})
    return found


def _save_pictures(
    console: Console, run: actstore.Run, dictionary: str, stories: Sequence[Story], beside: Path
) -> dict[str, str]:
    """Save a picture and a page of the latents beside the store; return their paths."""
    if not stories:
        return {}
    plots = lazy_import("actstore.query.plots", needed_for="the demo's picture", extra="query")
    pages = lazy_import("actstore.query.latent_page", needed_for="the demo's page", extra="query")
    numbers = [story.neuron for story in stories]
    title = f"Latents of {dictionary} on {run.id}"
    figure = plots.latents_figure(
        run.codes(dictionary).stats(),
        numbers,
        labels={story.neuron: short(story, show.quote) for story in stories},
        title=title,
    )
    notes = {story.neuron: story.sentence(quote=show.quote) for story in stories}
    page = pages.latent_page(run, dictionary, numbers, k=_ON_PAGE, title=title, notes=notes, fold="doc")
    files = {
        "picture": _save(beside.with_name(beside.name + ".png"), plots.figure_bytes(figure, dpi=110)),
        "page": _save(beside.with_name(beside.name + ".html"), page.encode("utf-8")),
    }
    console.print()
    show.line(
        console, f"picture: {files['picture']}   page with {_ON_PAGE} contexts of each: {files['page']}"
    )
    return files


def _save(path: Path, data: bytes) -> str:
    """Write a file unless it says the same already; return its path."""
    if not (path.is_file() and path.read_bytes() == data):
        save_file(path, data)
    return str(path)
