"""The optimizers of the config's `optimizer` section: fused AdamW, and Muon with AdamW."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, UserError


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW (torch has it for cuda, mps and cpu); with optimizer.type muon, Muon for the layers' matrices.

    Weight decay acts on matrices only, not on the gains of the norms.
    """
    opt = config.optimizer
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() >= 2]
    hidden = [parameter for name, parameter in named if opt.type == "muon" and name.startswith("layers.")]
    matrices = [parameter for name, parameter in named if opt.type != "muon" or not name.startswith("layers.")]
    groups = [{"params": matrices, "weight_decay": opt.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": opt.learning_rate, "betas": (opt.adam_beta1, opt.adam_beta2), "eps": opt.adam_epsilon,
                "fused": True}
    ratio = (opt.muon_learning_rate or opt.learning_rate) / opt.learning_rate
    return MuonWithAdamW(hidden, ratio, groups, **settings) if hidden else torch.optim.AdamW(groups, **settings)


def describe_optimizer(config: Config) -> str:
    """The optimizer's name and peak learning rate; with Muon both rates, where they differ."""
    opt = config.optimizer
    if opt.type == "adamw" or opt.muon_learning_rate in (None, opt.learning_rate):
        return f"{opt.type}, learning rate {opt.learning_rate:g}"
    return f"muon, learning rate {opt.muon_learning_rate:g} ({opt.learning_rate:g} for adamw's parameters)"


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: Path) -> None:
    """Restore the optimizer's state from the checkpoint `source`, but keep the settings of the present config."""
    settings = [{key: of[key] for key in ("betas", "eps", "weight_decay")} for of in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: its optimizer state does not fit this model ({error})") from None
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


class MuonWithAdamW(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the matrices `hidden`, AdamW for `groups`, as one optimizer.

    Muon's step is the orthogonalized momentum, scaled to the usual size of AdamW's steps (Liu et al., 2025, section
    2.2), as torch.optim.Muon with adjust_lr_fn="match_rms_adamw" has it; but all matrices of one shape are one batch,
    since a GPU spends most of a step of torch's Muon on launching its small products. Its learning rate is `ratio`
    times that of the first group; its momentum is that group's first beta, and its weight decay that group's.
    """

    def __init__(self, hidden: Sequence[Tensor], ratio: float, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.hidden, self.ratio, self.found_inf = list(hidden), ratio, None
        by_shape: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(self.hidden):
            by_shape.setdefault(matrix.shape, []).append(index)
        self.stacks = list(by_shape.values())  # indices of the matrices of one shape
        self.momenta = [torch.stack([torch.zeros_like(self.hidden[index]) for index in stack]) for stack in self.stacks]

    @torch.no_grad()
    def step(self) -> None:
        """One step of both; no step if found_inf, float32, (), is not 0. Does not wait for the device.

        Muon's products are computed as those of the model are: in bf16 under autocast, else in float32.
        """
        super().step()
        first = self.param_groups[0]
        rate, momentum = self.ratio * first["lr"], first["betas"][0]
        for stack, average in zip(self.stacks, self.momenta, strict=True):
            matrices = [self.hidden[index] for index in stack]
            gradients = torch.stack([matrix.grad for matrix in matrices])  # (matrices, rows, columns)
            average.lerp_(gradients, 1 - momentum)
            update = orthogonalize(gradients.lerp(average, momentum)).type_as(average)  # Nesterov's momentum
            scale, decay = 0.2 * rate * math.sqrt(max(average.shape[1:])), 1 - rate * first["weight_decay"]
            if self.found_inf is not None:
                update = torch.where(self.found_inf > 0, 0, update)
                decay = torch.where(self.found_inf > 0, 1, torch.full_like(self.found_inf, decay))
            torch._foreach_mul_(matrices, decay)
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for matrix in self.hidden:
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        momenta = {index: {"momentum_buffer": average[place]} for stack, average in zip(
            self.stacks, self.momenta, strict=True) for place, index in enumerate(stack)}
        return {**super().state_dict(), "muon": {"state": momenta}}  # as torch.optim.Muon names it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for stack, average in zip(self.stacks, self.momenta, strict=True):
            for place, index in enumerate(stack):
                average[place].copy_(state_dict["muon"]["state"][index]["momentum_buffer"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values near 1, (matrices, rows, columns), by five Newton-Schulz steps.

    The quintic iteration of Jordan et al., 2024, whose result has singular values from 0.5 to 1.5. bf16 under autocast.
    Without it float32, since a CPU without fast bf16 takes 25 times as long for bf16 products.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.mT if (tall := matrices.shape[1] > matrices.shape[2]) else matrices  # the smaller product of the two
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
