"""Optimizers that DeepSpeed does not build from its JSON."""

from typing import Any

import torch
from torch import nn

from cogview2.pipeline.config.training import OptimizerConfig


def _split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable weights of layers, and the vectors (biases, norms) and embeddings."""
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            skip = parameter.ndim < 2 or id(parameter) in embeddings or "embeddings" in name
            (others if skip else weights).append(parameter)
    return weights, others


def _groups(*groups: tuple[list[nn.Parameter], float]) -> list[dict[str, Any]]:
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: no weight decay on vectors (biases, norms) and embeddings (spec 2.7)."""
    weights, others = _split(module)
    return _groups((weights, weight_decay), (others, 0.0))


_LEAST_SIDE = 8
"""A matrix with fewer rows or columns, such as the last layer to three colours, is left to AdamW."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices of linear layers and convolutions, AdamW on everything else, as one optimizer.

    A convolution [out, in, height, width] counts as a matrix [out, in * height * width]. Both parts take the same
    learning rate: Muon's update is scaled to the size of AdamW's. Muon needs whole matrices with whole
    gradients, so it does not go with ZeRO's partitions.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        """Take the trainable parameters of `module`; `config` gives learning rate, decay, betas and eps."""
        weights, others = _split(module)
        rate, decay = config.learning_rate, config.weight_decay
        matrices = _groups(([p for p in weights if _is_matrix(p)], decay))
        rest = _groups(([p for p in weights if not _is_matrix(p)], decay), (others, 0.0))
        flat = [group | {"params": [nn.Parameter(_flat(p)) for p in group["params"]]} for group in matrices]
        self._muon = torch.optim.Muon(flat, lr=rate, adjust_lr_fn="match_rms_adamw") if flat else None
        self._adamw = (
            torch.optim.AdamW(rest, lr=rate, betas=config.betas, eps=config.eps, fused=True) if rest else None
        )
        super().__init__([*matrices, *(self._adamw.param_groups if self._adamw else [])], {"lr": rate})
        self._matrices = len(matrices)
        self._share()

    def _share(self) -> None:
        """Let AdamW work on this optimizer's own groups and state, which are what is scheduled and saved."""
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = self.param_groups[self._matrices :], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if self._adamw is not None:
            self._adamw.step()
        if self._muon is None:
            return
        pairs = []
        for group, flat_group in zip(self.param_groups, self._muon.param_groups, strict=False):
            flat_group["lr"] = group["lr"]
            pairs += list(zip(group["params"], flat_group["params"], strict=True))
        for parameter, flat in pairs:
            # Views anew each time: an engine may have moved the weights to another storage.
            flat.data = _flat(parameter)
            flat.grad = None if parameter.grad is None else parameter.grad.reshape(flat.shape)
            if parameter in self.state:
                state = self._muon.state[flat] = self.state[parameter]
                if "momentum_buffer" in state:  # of a checkpoint it has the parameter's shape
                    state["momentum_buffer"] = state["momentum_buffer"].view(flat.shape)
        self._muon.step()
        for parameter, flat in pairs:
            flat.grad = None
            if flat in self._muon.state:
                self.state[parameter] = self._muon.state[flat]


def _flat(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.data.view(len(parameter), -1)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= _LEAST_SIDE


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer | None:
    """Return the optimizer for `deepspeed.initialize`, or None where DeepSpeed builds AdamW itself."""
    return MuonWithAdamW(module, config) if config.kind == "muon" else None
