"""`ForecastTrainer`: teaches every layer's Forecast to point where the layer's attention looks.

One forward of the frozen model per batch. At each layer the loss is computed and sent back into
that layer's projection alone, so nothing is recomputed and memory is linear in the length. Where
ranks share the model, each has the projections of all KV heads, and computes with those of its own.

Constants are those of SparDA (arXiv 2606.04511), Forecast training: AdamW, betas 0.9 and 0.95,
eps 1e-6, weight decay 0.01, gradient norm clipped at 0.5, constant rate 5e-4, 2000 steps of 32
sequences of 64K tokens, every layer's loss with weight one.

Differs from the released recipe: projections start from the model's own queries
(`forecast/start.py`), master weights and moments are float32, and the model attends densely (there
it reads the blocks that the teacher chose).
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, get_args

import torch
from torch import Tensor, nn

from sparda_compile import __version__
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.forecast.parts import parts_of
from sparda_compile.forecast.projection import to_tensors
from sparda_compile.forecast.weights import ForecastInfo, ForecastWeights
from sparda_compile.graph.site import forecast_dim
from sparda_compile.module.captures_of import captures_of
from sparda_compile.training import parallel
from sparda_compile.training.checkpoint import Checkpoint, random_states, restore_random_states
from sparda_compile.training.data import check_batch
from sparda_compile.training.fields import check_fits
from sparda_compile.training.loss import backward_loss
from sparda_compile.training.mass_loss import backward_mass_loss, scores_low_bit_keys
from sparda_compile.training.names import Teacher
from sparda_compile.training.progress import uninterrupted
from sparda_compile.training.rank_start import traced_config, whole_start
from sparda_compile.training.recall import block_recall
from sparda_compile.training.report import HeldOutReport, StepReport
from sparda_compile.training.taps import TappedForward, tap_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sparda_compile.config import SpardaConfig
    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.training.teacher import Backend

__all__ = ["ForecastTrainer"]

_BETAS: Final = (0.9, 0.95)
_EPS: Final = 1e-6
_WEIGHT_DECAY: Final = 0.01
_LARGEST_NORM: Final = 0.5
_RECALL_QUERIES: Final = 64


class ForecastTrainer:
    """Projections in training, their optimizer, and the model that teaches them.

    Args:
        model: As for `train_forecast`.
        config: As for `train_forecast`; `top_k` must be a number.
        lr: Learning rate.
        recall_queries: Positions per sequence that recall is measured at; 0 for none.
        last_tokens: As for `train_forecast`.
        teacher: As for `train_forecast`.
        backend: What computes the loss: `plain` PyTorch or `triton`; see `teacher.is_fused`.

    Raises:
        ConfigError: If `top_k` is not a number of at least one, the teacher not known, or several
            heads of a Forecast are to be trained for a selector on pooled keys.
        UnsupportedInputError: If the model is in training mode, or not one that `optimize` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SpardaConfig,
        lr: float,
        *,
        recall_queries: int = _RECALL_QUERIES,
        last_tokens: int | None = None,
        teacher: Teacher = "attention",
        backend: Backend = "auto",
    ) -> None:
        if teacher not in get_args(Teacher):
            raise ConfigError(
                f"teacher={teacher!r} is not known; use one of {', '.join(get_args(Teacher))}."
            )
        if not config.top_k:
            raise ConfigError(
                f"top_k={config.top_k} leaves a Forecast nothing to choose; train with the number "
                "of blocks that it is to pick, such as 62, the paper's."
            )
        if config.heads_of_forecast > 1 and not scores_low_bit_keys(config):
            raise ConfigError(
                f"forecast_heads={config.forecast_heads} cannot be trained for selector="
                f"{config.selector!r}, whose loss is that of one head per KV head; use "
                "selector='lowbit2' or 'lowbit4', or forecast_heads=1."
            )
        if not lr > 0.0:
            raise ConfigError(f"lr={lr} is not allowed; use more than 0, such as 5e-4.")
        self.config = config
        self.captures = captures_of(model)
        self.ranks = self.captures.ranks
        self.device = next(self.captures.model.parameters()).device
        self.dtype = next(self.captures.model.parameters()).dtype
        self.steps_done = self.longest = 0
        self._lr = lr
        self._recall_queries = recall_queries
        self._last_tokens = last_tokens
        self._teacher: Teacher = teacher
        loss_of = backward_mass_loss if scores_low_bit_keys(config) else backward_loss
        self._loss_of = partial(loss_of, backend=backend)
        self._forwards: dict[int, TappedForward] = {}
        self._traced = traced_config(self.captures, config)
        start = whole_start(self.captures, self._forward(1), config)
        self.weights = {layer: weight.map(nn.Parameter) for layer, weight in start.items()}
        self.parameters = to_tensors(self.weights)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr, betas=_BETAS, eps=_EPS, weight_decay=_WEIGHT_DECAY
        )

    def step(
        self, batches: Sequence[Tensor], on_batch: Callable[[int, int], None] | None = None
    ) -> StepReport:
        """Take one optimizer step.

        Args:
            batches: This process's token ids, [B, T] each; their gradients are averaged.
            on_batch: Called after each of them, with how many are done and the steps before.

        Returns:
            What the step saw; waits for the device.

        Raises:
            UnsupportedInputError: If a batch does not fit the model, or the loss is not finite.
            RanksDisagreeError: If ranks of one replica have other batches.
        """
        start = time.perf_counter()
        with self.ranks.together("a step of training") as facts:
            facts.update((f"batch {number}", ids) for number, ids in enumerate(batches))
        losses = {layer: torch.zeros((), device=self.device) for layer in self.weights}
        # Recall takes many small kernels: each replica looks at some of the layers.
        replicas = self.replicas
        recalls = {layer: losses[layer] for layer in replicas.share(list(losses))}
        self.optimizer.zero_grad(set_to_none=True)
        for number, ids in enumerate(batches):
            is_last = number == len(batches) - 1
            self._accumulate(ids, 1.0 / len(batches), losses, recalls if is_last else None)
            if on_batch is not None:
                on_batch(number + 1, self.steps_done)
        gradients = [w.grad for w in self.parameters.values() if w.grad is not None]
        found = [recalls.get(layer, torch.zeros_like(loss)) for layer, loss in losses.items()]
        parallel.average_([*gradients, *losses.values(), *found])
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), _LARGEST_NORM)
        found = [recall * replicas.count for recall in found]
        numbers = torch.stack([*losses.values(), *found, norm]).tolist()
        bad = [i for i, loss in zip(losses, numbers, strict=False) if not math.isfinite(loss)]
        if bad or not math.isfinite(numbers[-1]):
            raise UnsupportedInputError(
                f"the loss or its gradient is not finite at step {self.steps_done + 1} (layers "
                f"{bad}): the model computes NaN or infinity on this batch. Check its weights, "
                "and run it in bfloat16 or float32 rather than float16."
            )
        # A checkpoint must not have half of a step.
        with uninterrupted():
            self.optimizer.step()
            self.steps_done += 1
        count = len(losses)
        return StepReport(
            self.steps_done,
            dict(zip(losses, numbers[:count], strict=True)),
            dict(zip(losses, numbers[count : 2 * count], strict=True)),
            numbers[-1],
            sum(ids.numel() for ids in batches) * replicas.count,
            time.perf_counter() - start,
        )

    def _accumulate(
        self,
        ids: Tensor,
        share: float,
        losses: dict[int, Tensor],
        recalls: dict[int, Tensor] | None,
    ) -> None:
        """Add one batch's losses and gradients; set those recalls that are asked for."""
        check_batch(ids, self.config, self._vocab_size)
        self.longest = max(self.longest, ids.shape[1])

        def listen(site: AttentionSite, forecast: Tensor, query: Tensor, k: Tensor) -> None:
            loss = self._loss_of(
                forecast,
                query,
                k,
                self.config,
                site.scale,
                softcap=site.softcap,
                weight=share,
                last_tokens=self._last_tokens,
                teacher=self._teacher,
            )
            losses[site.layer] = losses[site.layer] + loss * share
            if recalls is not None and site.layer in recalls:
                recalls[site.layer] = block_recall(
                    forecast.detach(),
                    query,
                    k,
                    self.config,
                    site.scale,
                    self._recall_queries,
                    last_tokens=self._last_tokens,
                )

        self.run(ids, listen)

    def measure(self, batches: Iterable[Tensor]) -> HeldOutReport:
        """Return the loss and the recall on texts that are not learned from; nothing changes.

        Args:
            batches: Token ids, [B, T] each, B as in training.

        Raises:
            ConfigError: If there is no batch.
            UnsupportedInputError: If a batch does not fit the model.
        """
        losses = {layer: torch.zeros((), device=self.device) for layer in self.weights}
        recalls, count, num_tokens = dict(losses), 0, 0
        trained = self.weights
        self.weights = {layer: weight.map(torch.detach) for layer, weight in trained.items()}
        try:
            for ids in batches:
                found = dict.fromkeys(losses, torch.zeros((), device=self.device))
                self._accumulate(ids, 1.0, losses, found)
                recalls = {layer: recalls[layer] + found[layer] for layer in recalls}
                count, num_tokens = count + 1, num_tokens + ids.numel()
        finally:
            self.weights = trained
        if not count:
            raise ConfigError("there is no batch to measure; pass one of held-out texts or more.")
        parallel.average_([*losses.values(), *recalls.values()], self.ranks)
        numbers = (torch.stack([*losses.values(), *recalls.values()]) / count).tolist()
        return HeldOutReport(
            self.steps_done,
            dict(zip(losses, numbers[: len(losses)], strict=True)),
            dict(zip(losses, numbers[len(losses) :], strict=True)),
            num_tokens,
        )

    def run(self, ids: Tensor, listener: Callable[..., None] | None) -> None:
        """Run the model over a batch with a listener; None runs the backbone alone."""
        ids = ids.to(self.device, non_blocking=True)
        positions = torch.arange(ids.shape[1], device=self.device).expand(ids.shape)
        forward = self._forward(ids.shape[0])
        with torch.enable_grad():
            mine = parts_of(self.weights, forward.shapes, self.ranks)
            weights = {layer: weight.to(self.dtype) for layer, weight in mine.items()}
            forward(ids, positions, weights, listener)

    def forecast(self) -> ForecastWeights:
        """Return a copy of the projections, float32."""
        detached = {layer: weight.map(torch.detach) for layer, weight in self.weights.items()}
        copies = {layer: weight.map(torch.clone) for layer, weight in detached.items()}
        return ForecastWeights(copies, self.info())

    def info(self) -> ForecastInfo:
        """Return what the projections are for."""
        sites, config = self._forward(1).sites, self.config
        shapes = [self.weights[site.layer].shape for site in sites]
        dims, heads = tuple(map(forecast_dim, sites)), config.heads_of_forecast
        assert config.top_k is not None
        return ForecastInfo(
            model=self.captures.model_name,
            layers=tuple(site.layer for site in sites),
            groups=tuple(each.rows // dim // heads for each, dim in zip(shapes, dims, strict=True)),
            head_dim=dims,
            hidden=tuple(shape.hidden for shape in shapes),
            ranks=tuple(shape.rank for shape in shapes),
            block_size=config.block_size,
            pool_size=config.pool_size,
            pool_stride=config.pool_stride,
            top_k=config.top_k,
            selector=config.selector,
            heads=heads,
            steps=self.steps_done,
            num_tokens=self.longest,
            versions={"sparda-compile": __version__, "torch": str(torch.__version__)},
        )

    def checkpoint(self, num_batches: int) -> Checkpoint:
        """Return the state of the run."""
        weights = {name: weight.detach() for name, weight in self.parameters.items()}
        return Checkpoint(
            self.steps_done,
            num_batches,
            weights,
            self.optimizer.state_dict(),
            random_states(self.device),
            self.info(),
        )

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a state.

        Raises:
            ConfigError: If it is the state of another model or of other sizes.
        """
        check_fits(checkpoint, self.info(), self.parameters, self.optimizer.state_dict())
        for name, weight in self.parameters.items():
            weight.copy_(checkpoint.weights[name])
        groups = self.optimizer.state_dict()["param_groups"]
        state = {"state": checkpoint.optimizer["state"], "param_groups": groups}
        self.optimizer.load_state_dict(state)
        self.steps_done, self.longest = checkpoint.step, checkpoint.info.num_tokens
        restore_random_states(checkpoint.rng, self.device)

    def _forward(self, batch_size: int) -> TappedForward:
        if batch_size not in self._forwards:
            self._forwards[batch_size] = tap_forward(self.captures, self._traced, batch_size)
        return self._forwards[batch_size]

    @property
    def replicas(self) -> parallel.Replicas:
        """The replicas that train together.

        Raises:
            UnsupportedInputError: If the processes are no whole number of them.
        """
        return parallel.Replicas.of(self.ranks)

    @property
    def _vocab_size(self) -> int | None:
        config: Any = getattr(self.captures.model, "config", None)
        return getattr(config.get_text_config(), "vocab_size", None) if config else None
