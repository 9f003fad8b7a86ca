"""How is a sparse autoencoder trained on the command line?"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import actstore
from actstore.cli import INTERRUPTED
from actstore.cli.console import visible_lines
from actstore.ingest.training import HookPointReport, SaeTrainConfig, SaeTrainReport, TrainProgress, train_sae
from actstore.ingest.training.job import Notice, ProgressCallback

HELP = "train a sparse autoencoder for each hook point, in one pass over a run's rows"

_DEFAULTS = {f.name: f.default for f in fields(SaeTrainConfig) if f.default is not MISSING}
_OPTIONS = {
    "method": (str, "topk, batchtopk or jumprelu"),
    "n_rows": (int, "stored rows to go through; default: all once"),
    "batch_rows": (int, "rows of a step"),
    "seed": (int, "of weights, order and choice of documents"),
    "learning_rate": (float, "peak; default: the method's own"),
    "warmup_share": (float, "share of the steps over which the rate rises"),
    "decay_share": (float, "share of the steps over which it falls"),
    "bias_init": (str, "geometric_median, mean or zero"),
    "aux_k": (int, "dead latents that explain what is left; default: about d_model / 2"),
    "aux_coefficient": (float, "weight of that loss; 0 turns it off"),
    "dead_after_rows": (int, "rows without firing after which a latent is dead"),
    "bandwidth": (float, "jumprelu: width of its estimators' kernel"),
    "sparsity_coefficient": (float, "jumprelu: weight of (L0 / k - 1)^2"),
    "buffer_rows": (int, "rows that are mixed with each other"),
    "dtype": (str, "of the encoder's product: auto, float32 or bfloat16"),
    "eval_rows": (int, "rows of documents that are left out to measure on"),
    "loss_rows": (int, "rows of those to run the model on with spliced activations; 0 for none"),
    "device": (str, "auto, cpu, cuda or cuda:1"),
    "checkpoint_dir": (str, "folder of checkpoints; default: one in the user's cache folder"),
    "checkpoint_every_s": (float, "seconds between checkpoints"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of a run")
    parser.add_argument(
        "hook_points",
        metavar="HOOK_POINT",
        nargs="+",
        help="names, globs or ranges; all are trained in one pass",
    )
    parser.add_argument(
        "--name", required=True, help="of the dictionary; several get their hook point behind it"
    )
    parser.add_argument(
        "--latents", dest="n_latents", type=int, default=_DEFAULTS["n_latents"], help="default: 16384"
    )
    parser.add_argument(
        "--k", type=int, default=_DEFAULTS["k"], help="latents that fire on a row; default: 32"
    )
    for name, (kind, text) in _OPTIONS.items():
        usual = _DEFAULTS[name]
        shown = (
            text
            if usual is None or "default" in text
            else f"{text}; default: {usual:g}"
            if kind is float
            else text
        )
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=usual, help=shown)
    parser.add_argument("--keep-special", action="store_true", help="train on special tokens too")
    parser.add_argument("--keep-sinks", action="store_true", help="train on attention sinks too")


def run(args: argparse.Namespace) -> int:
    config = SaeTrainConfig(
        name=args.name,
        n_latents=args.n_latents,
        k=args.k,
        mask_special=not args.keep_special,
        mask_sinks=not args.keep_sinks,
        **{name: getattr(args, name) for name in _OPTIONS},
    )
    with _bar(args.name, quiet=args.json) as (progress, notice):
        report = train_sae(
            actstore.open(args.store),
            args.run_name,
            args.hook_points,
            config,
            progress=progress,
            notice=notice,
        )
    if args.json:
        print(
            json.dumps({**asdict(report), "hook_points": [found.to_json() for found in report.hook_points]})
        )
    else:
        for line in _lines(report, args.store):
            print(visible_lines(line))
    return 0 if report.is_complete else INTERRUPTED


@contextmanager
def _bar(name: str, *, quiet: bool) -> Iterator[tuple[ProgressCallback | None, Notice | None]]:
    """Yield callbacks that draw on stderr; None when nothing is to be drawn."""
    if quiet:
        yield None, None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps · {task.fields[rows]} · {task.fields[found]} ·"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None, rows="-", found="-")

        def show(p: TrainProgress) -> None:
            rate = p.rows_this_job / p.elapsed_s if p.elapsed_s else 0.0
            found = " ".join(f"FVU {v.fvu:.3f} L0 {v.l0:.1f} dead {v.n_dead:,}" for v in p.latest.values())
            bar.update(task, completed=p.steps_done, total=p.n_steps, rows=f"{rate:,.0f} rows/s", found=found)

        yield show, lambda line: console.print(visible_lines(line), markup=False, highlight=False)


def _lines(report: SaeTrainReport, store: str) -> Iterator[str]:
    if not report.is_complete:
        yield (
            f"stopped behind step {report.steps_done:,} of {report.n_steps:,}, checkpoint in {report.checkpoint_dir}: "
            "run the same command again to go on"
        )
        return
    if report.steps_this_job:
        yield f"{report.steps_this_job:,} steps, {report.rows_per_s:,.0f} rows/s (version {report.version})"
    for found in report.hook_points:
        yield from _measured(found)
        yield f"  next: actstore sae encode {store} {found.dictionary} {report.run}"


def _measured(found: HookPointReport) -> Iterator[str]:
    where = "held-out" if found.is_held_out else "training"
    yield (
        f"dictionary {found.dictionary}: explained variance {found.explained_variance:.3f}, L0 {found.l0:.1f}, "
        f"dead {found.dead_share:.1%}, MSE {found.mse:.3g} on {found.n_eval_rows:,} {where} rows"
    )
    if found.loss is None:
        yield f"  loss recovered: not measured, {found.loss_note}"
    else:
        loss = found.loss
        yield (
            f"  loss recovered {loss.recovered:.1%} (nats per token: {loss.clean:.3f} clean, {loss.spliced:.3f} spliced, "
            f"{loss.zero_ablated:.3f} zeros, {loss.mean_ablated:.3f} mean)"
        )
    yield f"  trained on {found.n_trained_rows:,} rows; {found.n_masked_rows:,} masked"
