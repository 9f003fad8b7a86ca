"""How does a model go through torch.compile and still show its activations?

A hook inside of compiled code is traced with it, and one that is put on later is not seen at all. So what is compiled are the
largest modules with no hook inside: a whole layer where only its input and output are wanted, its attention, MLP and norms
one by one where something between them is. The hooks run outside of compiled code, so leaving the forward pass early works
as ever, and so does everything around the layers (masks, positions), which is not compiled. Layers of one kind share their
compiled code. Shapes are dynamic, so that batches of all lengths share it too.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .architectures import Site

Forward = Callable[..., Any]

_RECOMPILES = 64
"""Versions of one function's code that may be kept: layers of several kinds (local and global attention, dense and sparse),
times batches with and without padding, of one window and of many. torch's own limit of 8 would quietly end in eager code."""


def compiled_regions(model: "nn.Module", layers_path: str | None, sites: "Sequence[Site]") -> tuple[str, ...]:
    """Return the paths of the largest modules within the model's list of layers that have no hooked module inside.

    A hook on a module itself is not inside: its forward is compiled, and the hook is called around it.
    """
    from torch import nn

    if layers_path is None:
        return ()
    hooked = {site.path for site in sites}
    regions = list[str]()
    todo = [f"{layers_path}.{name}" for name, _ in model.get_submodule(layers_path).named_children()]
    while todo:
        path = todo.pop(0)
        module = model.get_submodule(path)
        children = [f"{path}.{name}" for name, _ in module.named_children()]
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if is_list or any(name.startswith(f"{path}.") for name in hooked):
            todo += children
        elif children or any(True for _ in module.parameters(recurse=False)):
            regions.append(path)
    return tuple(regions)


@contextlib.contextmanager
def compiled(
    model: "nn.Module", layers_path: str | None, sites: "Sequence[Site]", kept: dict[str, Forward]
) -> Iterator[None]:
    """Let the model run compiled between its hooks; its own forward functions are back at the end.

    Args:
        model: The model.
        layers_path: Its list of layers.
        sites: Where hooks are.
        kept: Compiled functions by path, of an earlier use with the same sites; filled at the first.
    """
    import torch
    import torch._dynamo

    if not kept:
        for path in compiled_regions(model, layers_path, sites):
            kept[path] = torch.compile(model.get_submodule(path).forward, dynamic=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            torch._dynamo.config.patch(
                recompile_limit=_RECOMPILES, accumulated_recompile_limit=_RECOMPILES * 8
            )
        )
        for path, forward in kept.items():
            module = model.get_submodule(path)
            before = module.__dict__.get("forward")
            module.__dict__["forward"] = forward
            stack.callback(_restore, module, before)
        yield


def _restore(module: "nn.Module", before: Forward | None) -> None:
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before
