"""What happens, in order, when dictionaries are trained on the stored activations of a run?

All is checked first. Rows are read once, in one shuffled order, and every hook point's dictionary takes a step on each
batch. From time to time, and when the training is stopped, a checkpoint is made: going on from it gives the same dictionary,
bit for bit on one thread of a CPU. At the end each dictionary is measured on documents that were left out, and stored.
"""

import threading
from collections.abc import Sequence

from actstore._lazy import missing
from actstore.errors import ConflictError, ErrorKind, InvalidInputError
from actstore.hook_points import expand_hook_points
from actstore.ingest.config import config_differences
from actstore.ingest.signals import stop_on_signals
from actstore.names import check_name
from actstore.run import Run
from actstore.store import Store

from .checkpoint import Checkpoint, CheckpointFolder, checkpoint_folder
from .config import SaeTrainConfig
from .job import Notice, ProgressCallback, TrainingJob, job_identity, training_id
from .report import HookPointReport, SaeTrainReport


def train_sae(
    store: Store,
    run: Run | str,
    hook_points: str | Sequence[str],
    config: SaeTrainConfig,
    *,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
    stop: threading.Event | None = None,
) -> SaeTrainReport:
    """Train a dictionary for each hook point of a run, in one pass over its rows, and store them; idempotent.

    A training that was stopped goes on from its checkpoint when this is called again with the same arguments; one that is
    complete is reported again from what its dictionaries keep.

    Cost: per step one dense product of rows and encoder for each hook point; memory besides the weights (4 times their size with
    gradients and moments) is two groups of `buffer_rows` stored rows per hook point.

    Args:
        store: Where the run is, and where the dictionaries go; moved to the version that has them.
        run: The run or its name. Rows that are stored when the training begins are used, later ones not.
        hook_points: Names, globs or ranges of hook points that the run keeps rows of.
        config: How to train.
        progress: Called now and then after a step.
        notice: Called with a line of text as each stage begins.
        stop: When set, the training stops behind its step with a checkpoint. SIGINT and SIGTERM do the same when this is
            called in the main thread; a second SIGINT interrupts at once.

    Raises:
        NotFoundError: no such run or hook point.
        InvalidInputError: a setting that cannot work, or no row that may be learned from.
        ConflictError: a dictionary of the name, or a checkpoint in the folder, is of another training.
        StorageError: rows cannot be read, or a checkpoint or dictionary not be written.
    """
    _check_torch()
    config = config.check()
    say = notice or (lambda _: None)
    stop = stop or threading.Event()
    run = store.refresh().run(run if isinstance(run, str) else run.id)
    names = _dictionary_names(run, hook_points, config.name)
    done = _stored_already(store, run, names, config)
    if done is not None:
        say(f"{', '.join(names.values())}: trained before")
        return done
    folder = CheckpointFolder(checkpoint_folder(config.checkpoint_dir, store.url, config.name))
    with folder.locked():
        checkpoint = folder.load()
        _check_same(checkpoint, config, run, names, folder)
        if checkpoint is not None:
            run = store.at(int(checkpoint.values["version"])).run(run.id)
        job = TrainingJob(run, names, config, folder, checkpoint, say, progress)
        with stop_on_signals(
            stop, lambda _: say("stopping behind this step; interrupt once more to stop at once")
        ):
            is_done = job.train(stop)
        if not is_done:
            return job.report(store.version, ())
        reports = job.finish(store)
        folder.clear()
    return job.report(store.version, reports)


def _check_torch() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing("torch", needed_for="train_sae()", extra="ingest") from error


def _dictionary_names(run: Run, hook_points: str | Sequence[str], name: str) -> dict[str, str]:
    """Return the dictionary of each hook point.

    Raises:
        NotFoundError: no such hook point.
        InvalidInputError: the run keeps no rows of it, or a name that is too long.
    """
    asked = hook_points if isinstance(hook_points, str) else list(hook_points)
    found = expand_hook_points(asked, tuple(run.hook_points))
    for hook_point in found:
        run.activations(hook_point)
    if not run.n_rows:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"run {run.id!r} has no rows yet: ingest it first")
    if len(found) == 1:
        return {found[0]: name}
    # A module's name has a colon, which a dictionary's cannot have.
    return {h: check_name(f"{name}.{h.replace(':', '-')}", what="dictionary name") for h in found}


def _stored_already(
    store: Store, run: Run, names: dict[str, str], config: SaeTrainConfig
) -> SaeTrainReport | None:
    """Return the report of dictionaries that this training made before, None if not all are there.

    Raises:
        ConflictError: a dictionary of such a name is another one.
    """
    reports = []
    for hook_point, name in names.items():
        found = store.state.collections.get(("dictionary", name))
        if found is None:
            continue
        if found.config.get("source", {}).get("training") != training_id(config, run, hook_point):
            raise ConflictError(
                ErrorKind.CONFIG_DIFFERS,
                f"dictionary {name!r} exists and was not trained with these settings on {hook_point} of run {run.id!r}: "
                "give another name",
            )
        reports.append((found.info["training"], HookPointReport.from_json(found.info["training"]["report"])))
    if len(reports) < len(names):
        return None
    steps = int(reports[0][0]["n_steps"])
    return SaeTrainReport(
        run.id, True, steps, steps, 0, 0.0, 0.0, store.version, tuple(r for _, r in reports), None
    )


def _check_same(
    checkpoint: Checkpoint | None,
    config: SaeTrainConfig,
    run: Run,
    names: dict[str, str],
    folder: CheckpointFolder,
) -> None:
    if checkpoint is None:
        return
    wanted = job_identity(config, run, names)
    if checkpoint.values["identity"] != wanted:
        lines = "\n  ".join(config_differences(checkpoint.values["identity"], wanted))
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"the checkpoint in {str(folder.folder)!r} is of another training (stored -> asked):\n  {lines}\n"
            "Give the same settings to go on with it, another name or checkpoint_dir, or delete that folder",
        )
