"""The optimizers of the config's `optimizer` section: fused AdamW, and Muon with AdamW."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, UserError


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW (torch has it for cuda, mps and cpu); with optimizer.type muon, Muon for the layers' matrices.

    Weight decay acts on matrices only, not on the gains of the norms. Raises UserError if this torch has no Muon.
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
    2.2). Its learning rate is `ratio` times that of the first group; its momentum is that group's first beta, and its
    weight decay that group's.
    """

    def __init__(self, hidden: Sequence[Tensor], ratio: float, groups: list[dict[str, Any]], **settings: Any) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optimizer.type muon: torch {torch.__version__} has no Muon; 2.9 is the first that has: "
                            "set the type to adamw")
        super().__init__(groups, **settings)
        self.hidden, self.ratio, self.found_inf = hidden, ratio, None
        self.muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        """One step of both; no step if found_inf, float32, (), is not 0. Does not wait for the device."""
        first, own = self.param_groups[0], self.muon.param_groups[0]
        own.update(lr=self.ratio * first["lr"], momentum=first["betas"][0], weight_decay=first["weight_decay"])
        before = [matrix.clone() for matrix in self.hidden]
        super().step()
        self.muon.step()
        if self.found_inf is not None:  # torch's Muon ignores found_inf
            for matrix, old in zip(self.hidden, before, strict=True):
                matrix.copy_(torch.where(self.found_inf > 0, old, matrix))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.muon.load_state_dict(state_dict["muon"])
