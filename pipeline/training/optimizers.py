"""Optimizers that DeepSpeed does not build from its JSON."""

from typing import Any

import torch
from torch import nn

from cogview2.pipeline.config.training import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters: no weight decay on vectors (biases, norms) and embeddings (spec 2.7)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            skip = parameter.ndim < 2 or id(parameter) in embeddings or "embeddings" in name
            (plain if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices of linear layers, AdamW on everything else, as one optimizer.

    Both take the same learning rate: Muon's update is scaled to the size of AdamW's. It needs whole matrices with
    whole gradients, so it does not go with ZeRO's partitions.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Split `groups` (of `parameter_groups`) once more, into matrices of decayed groups and the rest.

        Args:
            groups: with "params" and "weight_decay"; embeddings stand in groups without decay.
            config: learning rate, betas and eps.
        """
        matrices: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for group in groups:
            decay = float(group["weight_decay"])
            parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
            for parameter in group["params"]:
                parts[parameter.ndim == 2 and decay > 0].append(parameter)
            for part, target in zip(parts, (rest, matrices), strict=True):
                if part:
                    target.append({"params": part, "weight_decay": decay})
        rate, betas = config.learning_rate, config.betas
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=rate, betas=betas, eps=config.eps))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own groups and state, which is what is saved and scheduled."""
        start = 0
        for part in self._parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for part in self._parts:
            part.step()


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer | None:
    """Return the optimizer for `deepspeed.initialize`, or None where DeepSpeed builds AdamW itself."""
    return MuonWithAdamW(groups, config) if config.kind == "muon" else None
