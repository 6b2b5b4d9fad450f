"""Diagnosis of a loss or a gradient that is not finite: which module's output or gradient went wrong first."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from model import Transformer


@contextlib.contextmanager
def find_non_finite(model: Transformer) -> Iterator[list[str]]:
    """Watch forward and backward passes. The yielded list names what was not finite, in the order of computation."""
    faults: list[str] = []

    def check(tensor: Tensor, what: str) -> None:
        if not tensor.isfinite().all():
            faults.append(what)

    def check_output(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        check(output, f"the output of {name}")
        if output.requires_grad:
            output.register_hook(functools.partial(check, what=f"the gradient of {name}'s output"))

    with contextlib.ExitStack() as hooks:  # removes them at its end
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                hooks.enter_context(module.register_forward_hook(functools.partial(check_output, name)))
        for name, parameter in model.named_parameters():
            check(parameter, f"the weights {name}")
            hooks.enter_context(parameter.register_hook(functools.partial(check, what=f"the gradient of {name}")))
        yield faults
