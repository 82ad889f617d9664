"""DeepSpeed's ZeRO: optimiser and gradients lie in parts, one in each process; from stage 3 on the parameters too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, distributed, nn

from calpaca_trainer.errors import TrainingError
from calpaca_trainer.sharding import Sharding


class Zero(Sharding):
    """`config` holds DeepSpeed's options, some of them "auto"."""

    autocasts = False

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._stage: int = config["zero_optimization"]["stage"]
        self.name = f"ZeRO-{self._stage}"
        self.collective = self._stage == 3
        self.casts = config.get("bf16", {}).get("enabled") is True

    def identity(self) -> dict[str, Any]:
        return {"sharding": self._config}

    def arguments(self) -> dict[str, Any]:
        return {"deepspeed": self._config}

    def check(self, wrapped: nn.Module) -> None:
        stage = getattr(wrapped, "zero_optimization_stage", lambda: 0)()
        if stage != self._stage:
            raise TrainingError(
                f"{self.name} was asked for, but the model is a {type(wrapped).__name__} of stage {stage}.",
                "Leave --deepspeed out, or try --fsdp.",
            )

    def weights(self, model: nn.Module, *, trained: bool) -> Mapping[str, Tensor] | None:
        if self._stage < 3:
            return super().weights(model, trained=trained)
        from deepspeed.runtime.zero import GatheredParameters

        first, weights = distributed.get_rank() == 0, {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not trained:
                with GatheredParameters([parameter]):
                    if first:
                        weights[name] = parameter.detach().cpu().clone()
        return weights if first else None
