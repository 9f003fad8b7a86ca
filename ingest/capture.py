"""What does a model compute at its hook points, for every token of a unit?

One forward pass serves all hook points. Hooks only look: they return None, which leaves the model's output alone, and copy
their rows before the model can change them in place. When the last hook has fired, the rest of the forward pass is skipped.
Every row equals what the model computes on that row's window alone: windows are padded on the right, behind an attention
mask, and positions count from the window's start.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.dtypes import stored_dtype as numpy_dtype
from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.hook_points import parse_hook_point

from .architectures import Site
from .batches import plan_batches
from .compiling import compiled
from .models import LoadedModel
from .sinks import (
    Batch,
    CudaStream,
    HostSink,
    OverflowCount,
    Sink,
    StagedSink,
    StagingBuffers,
    SynchronousStream,
)

if TYPE_CHECKING:
    import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_PROBE_SHAPES = ((2, 5), (3, 4))
"""Windows x tokens of the passes that find widths: two, so that a dimension that only happens to fit shows."""


@dataclass(frozen=True, slots=True)
class CaptureStats:
    """What `Capturer.capture_unit` did."""

    n_tokens: int
    """Rows written per hook point."""
    n_windows: int
    n_batches: int
    n_padded: int
    """Tokens that went through the model, padding included."""


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the forward pass once every hook point has been seen."""


class Capturer:
    """Captures hook points of one model. Not safe for use by two threads at once: they would share the model's hooks.

    Holds two passes of a few tokens at the start, which find the width of each hook point and refuse places that have no
    row per token. Hooks are on the model only while a unit is captured.
    """

    def __init__(
        self, loaded: LoadedModel, hook_points: Sequence[str], *, equal_lengths: bool = False
    ) -> None:
        """Look up the hook points and find their widths.

        Args:
            loaded: The model.
            hook_points: Names, aliases or patterns, see `actstore.hook_points`.
            equal_lengths: Whether to pad nothing: only windows of one length go through the model together. For models
                that fail the padding part of `self_test`.

        Raises:
            NotFoundError: the model has no such hook point.
            InvalidInputError: a module that does not compute one vector per token, once per pass.
        """
        self.loaded, self.equal_lengths = loaded, equal_lengths
        self._names = loaded.map.resolve(list(hook_points))
        self._sites = {name: loaded.map.site(name) for name in self._names}
        self._compiled = dict[str, Callable[..., Any]]()
        self.widths: Mapping[str, int] = self._probe_widths()
        """Canonical hook point -> activations per row, in layer order."""
        self.heads: Mapping[str, int] = self._count_heads()
        """Every attn_z of them -> number of attention heads, which its width is divided among."""
        self._buffers: StagingBuffers | None = None

    def capture_unit(
        self,
        token_ids: Int32Array,
        window_starts: Int64Array,
        out: Mapping[str, npt.NDArray[Any]],
        *,
        batch_tokens: int,
        stored_dtype: str,
        should_stop: Callable[[], bool] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> CaptureStats:
        """Write the activations of a unit's tokens into `out`, a row per token in the order of `token_ids`.

        Idempotent: the same windows, budget and model give the same batches, and on one machine the same bits.

        Args:
            token_ids: All windows, one after the other; shape (n_rows,).
            window_starts: Where each window starts in `token_ids`, and at the end n_rows; shape (n_windows + 1,).
            out: Hook point -> array (n_rows, width) in the stored dtype, uint16 for bfloat16; for all of `widths`.
            batch_tokens: Tokens that go through the model together, padding included.
            stored_dtype: `float32`, `float16` or `bfloat16`; rounded to nearest even.
            should_stop: Asked before each batch.
            on_batch: Called after each batch with its number of tokens.

        Raises:
            InvalidInputError: OVERFLOW: finite values beyond the stored dtype; TOO_LARGE: a window beyond the model's
                context; BAD_TOKENIZER: a token id that the model has no embedding for.
            StorageError: INTERRUPTED: `should_stop` said so; `out` holds some rows and not others.
        """
        starts = np.asarray(window_starts, np.int64)
        lengths = np.diff(starts)
        self._check_input(token_ids, starts, lengths, out, stored_dtype)
        batches = plan_batches(lengths, batch_tokens, equal_lengths=self.equal_lengths)
        sink = self._make_sink(out, stored_dtype, max((int(lengths[b].sum()) for b in batches), default=0))
        n_padded = 0
        with self.hooked(sink.put) as forward:
            for windows in batches:
                if should_stop is not None and should_stop():
                    raise StorageError(
                        ErrorKind.INTERRUPTED, "capture was asked to stop between two batches: run it again"
                    )
                batch, ids_bt, mask_bt = make_batch(token_ids, starts, windows)
                sink.begin(batch)
                forward(ids_bt, mask_bt)
                sink.end()
                n_padded += ids_bt.size
                if on_batch is not None:
                    on_batch(len(batch.rows))
            sink.finish()
        return CaptureStats(len(token_ids), len(lengths), len(batches), n_padded)

    @contextlib.contextmanager
    def hooked(
        self, put: Callable[[str, "torch.Tensor"], None], *, to_the_end: bool = False, eager: bool = False
    ) -> Iterator[Callable[[Int64Array, Int64Array | None], None]]:
        """Give a function that runs the model on padded ids and mask, (windows, tokens), handing each activation to `put`.

        Args:
            put: Takes a hook point and its activations on the device, as the model made them.
            to_the_end: Whether to run the whole model even when all hooks have fired.
            eager: Whether to leave a model that was loaded to be compiled uncompiled.

        Raises:
            InvalidInputError: when a pass does not reach a hook point exactly once.
        """
        import torch

        seen = dict[str, int]()
        # An exception would leave the weights that accelerate moved in for one module on the device.
        run_all = to_the_end or self.loaded.is_spread

        def look(name: str, activations: Any) -> None:
            seen[name] = seen.get(name, 0) + 1
            put(name, _tensor(name, activations, self._sites[name].index))
            if len(seen) == len(self._sites) and not run_all:
                raise _StopForward

        def forward(ids_bt: Int64Array, mask_bt: Int64Array | None) -> None:
            seen.clear()
            device = self.loaded.device
            # Without padding there is no mask: attention then takes its causal path, and a window alone is computed
            # exactly as a plain call computes it. Positions are the model's own, from 0: padding is on the right.
            inputs = {"input_ids": torch.from_numpy(ids_bt).to(device, non_blocking=True)}
            if mask_bt is not None:
                inputs["attention_mask"] = torch.from_numpy(mask_bt).to(device, non_blocking=True)
            with contextlib.suppress(_StopForward):
                self.loaded.model(**inputs)
            if wrong := [
                f"{name} {seen.get(name, 0)} times" for name in self._sites if seen.get(name, 0) != 1
            ]:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"hook points must be reached once in each pass of the model, which reached {', '.join(wrong)}:"
                    " name another module",
                )

        with contextlib.ExitStack() as stack, torch.inference_mode():
            for name, site in self._sites.items():
                stack.callback(_register(self.loaded.model, name, site, look).remove)
            if self.loaded.compile and not eager:
                sites = list(self._sites.values())
                stack.enter_context(
                    compiled(self.loaded.model, self.loaded.map.layers_path, sites, self._compiled)
                )
            yield forward

    def _probe_widths(self) -> dict[str, int]:
        widths = dict[str, int]()
        shape = (0, 0)

        def put(name: str, activations: "torch.Tensor") -> None:
            found = tuple(activations.shape)
            fits = (
                found[:2] == shape
                if len(found) > 2
                else found[:1] == (shape[0] * shape[1],) and len(found) == 2
            )
            width = int(np.prod(found[2:] if len(found) > 2 else found[1:]))
            if not fits or not activations.is_floating_point() or widths.setdefault(name, width) != width:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"hook point {name!r} computes {activations.dtype} of shape {found} for {shape[0]} windows of"
                    f" {shape[1]} tokens, not one vector per token: name another module",
                )

        with self.hooked(put, to_the_end=True, eager=True) as forward:
            for shape in _PROBE_SHAPES:
                try:
                    forward(probe_ids(self.loaded, shape), None)
                except (RuntimeError, TypeError) as error:
                    raise InvalidInputError(
                        ErrorKind.BAD_MODEL,
                        f"the forward pass of this {self.loaded.fingerprint['architecture']} fails on {shape[1]} tokens, in"
                        f" {self.loaded.dtype} with {self.loaded.attn_implementation} attention: {error}. Some models"
                        " compute in float32 or with attn_implementation='eager' only",
                    ) from error
        return {name: widths[name] for name in self._names}

    def _count_heads(self) -> dict[str, int]:
        n_heads = self.loaded.map.n_heads
        names = [name for name in self._names if parse_hook_point(name).part == "attn_z"]
        if wrong := [name for name in names if n_heads is None or self.widths[name] % n_heads]:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"hook point {wrong[0]!r} is {self.widths[wrong[0]]} wide, which is not {n_heads} heads of one size:"
                " name the module instead (module:<path>:input)",
            )
        return {name: n_heads for name in names if n_heads is not None}

    def _check_input(
        self,
        token_ids: Int32Array,
        starts: Int64Array,
        lengths: Int64Array,
        out: Mapping[str, npt.NDArray[Any]],
        stored_dtype: str,
    ) -> None:
        dtype = numpy_dtype(stored_dtype)
        wanted = {name: ((len(token_ids), width), dtype) for name, width in self.widths.items()}
        given = {name: (array.shape, array.dtype) for name, array in out.items()}
        if wanted != given:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"the arrays to fill must be {wanted!r} (shape, dtype), and are {given!r}",
            )
        if starts[0] != 0 or starts[-1] != len(token_ids):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"windows must cover token rows 0 to {len(token_ids)}, and run from {starts[0]} to {starts[-1]}",
            )
        longest, context = int(lengths.max(initial=0)), self.loaded.context_length
        if context is not None and longest > context:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"window {int(lengths.argmax())} has {longest} tokens, and the model's context is {context}:"
                " tokenize with a smaller window",
            )
        low, high = int(token_ids.min(initial=0)), int(token_ids.max(initial=0))
        if low < 0 or high >= self.loaded.vocab_size:
            raise InvalidInputError(
                ErrorKind.BAD_TOKENIZER,
                f"token id {low if low < 0 else high} is outside the model's vocabulary [0, {self.loaded.vocab_size}):"
                " the corpus was tokenized for another model",
            )

    def _make_sink(self, out: Mapping[str, npt.NDArray[Any]], stored_dtype: str, max_rows: int) -> Sink:
        ordered = {name: out[name] for name in self._names}
        overflow = OverflowCount(stored_dtype, len(next(iter(out.values()))))
        device = self.loaded.device
        if device.type == "cpu":
            return HostSink(ordered, stored_dtype, overflow)
        if self._buffers is None:
            stream = CudaStream(device) if device.type == "cuda" else SynchronousStream()
            self._buffers = StagingBuffers(device, stream)
        return StagedSink(ordered, stored_dtype, overflow, self._buffers, max_rows)


def make_batch(
    token_ids: Int32Array, starts: Int64Array, windows: Int64Array
) -> tuple[Batch, Int64Array, Int64Array | None]:
    """Return where a batch's rows go, its ids padded on the right with 0, and its mask; no mask if nothing is padded.

    Ids and mask have shape (windows, longest). What the padding's id is does not matter behind the mask.
    """
    lengths = starts[windows + 1] - starts[windows]
    longest = int(lengths.max())
    shape = (len(windows), longest)
    valid_bt = np.arange(longest) < lengths[:, None]
    rows_bt = starts[windows][:, None] + np.arange(longest)
    rows = rows_bt[valid_bt]
    ids_bt = np.zeros(valid_bt.shape, np.int64)
    ids_bt[valid_bt] = token_ids[rows]
    if lengths.min() == longest:
        return Batch(shape, None, rows, lengths), ids_bt, None
    return Batch(shape, np.flatnonzero(valid_bt), rows, lengths), ids_bt, valid_bt.astype(np.int64)


def probe_ids(loaded: LoadedModel, shape: tuple[int, int]) -> Int64Array:
    """Return token ids to try a model with: spread over its vocabulary, the same every time; shape (windows, tokens)."""
    # Multiplicative hashing (Knuth, The Art of Computer Programming 3, section 6.4) with 2^32 over the golden ratio.
    spread = (np.arange(1, shape[0] * shape[1] + 1, dtype=np.uint64) * np.uint64(2654435769)) % np.uint64(
        1 << 32
    )
    return (spread % np.uint64(loaded.vocab_size)).astype(np.int64).reshape(shape)


def _register(model: Any, name: str, site: Site, look: Callable[[str, Any], None]) -> Any:
    """Put the hook on; both kinds return None, so the model's own values go on unchanged."""
    module = model.get_submodule(site.path)

    def after(_module: Any, _args: Any, output: Any) -> None:
        look(name, output)

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        look(name, args or kwargs.get("hidden_states", tuple(kwargs.values())))

    if site.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _tensor(name: str, value: Any, index: int) -> "torch.Tensor":
    """Return the tensor, or one of those in a tuple, list or model output: the first, or the one with that number."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    tensors = [item for item in values if isinstance(item, torch.Tensor)]
    if len(tensors) > index:
        return tensors[index]
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"hook point {name!r} carries no tensor but {type(value).__name__}: name another module",
    )
