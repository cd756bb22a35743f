"""Routers: select k of a group's N experts for each token, compute their gates, and balance the load.

An expert is a query head (routed GQA) or a value or output projection (SwitchHead).
Legend: B batch, S sequence, d width, G groups, N experts per group, k selected ones (slots).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from headway.kernels.device import fused
from headway.kernels.routing import GateName, balance_sums, gates, router_logits, top_k
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, Context, Ranks, StrictConfig
from headway.model.layers import FixedBuffers, parameter
from headway.model.measure.router_meter import RouterMeter
from headway.model.router_stats import RouterStats

HASH_BUCKETS = 4093
"""Rows of a token-hash router's table. A prime, so that ids that differ by a round number get different rows."""

SIGMOIDS = ("sigmoid", "sigmoid2")
"""Gates for which load balancing uses normalized sigmoids as probabilities; it uses a softmax for all other gates."""


class Routing(NamedTuple):
    """One router's output for a batch."""

    idx: Tensor  # [B, S, G, k] int64, best score first
    gate: Tensor  # [B, S, G, k], fp32 or wider
    aux_loss: Tensor | None  # scalar, including its coefficients


class RouterConfig(StrictConfig):
    """Options of all routers. Noise and dropout affect only the selection, and only in training; gates exclude them."""

    noise: Literal["none", "normal", "gumbel"] = Field(default="none", description="added to the scores in training")
    noise_scale: float = Field(default=1.0, gt=0, description="factor on the noise, in units of the logits")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="probability that an expert is dropped for a token, in training"
    )

    def num_params(self, *, width: int, groups: int, experts: int) -> int:
        """Trainable parameters."""
        return 0

    def flops_per_token(self, *, width: int, groups: int, experts: int) -> int:
        """Forward FLOPs, 2 per multiply-accumulate."""
        return 2 * self.num_params(width=width, groups=groups, experts=experts)

    @property
    def reads_queries(self) -> bool:
        """Whether the logits depend on the queries of all N heads, which must then be computed before the selection."""
        return False

    @abstractmethod
    def build(self, routing: RoutingConfig, *, width: int, groups: int, experts: int) -> Router:
        """Build the router module."""
        raise NotImplementedError

    def shards(self) -> tuple[str, ...]:
        """Names of the parameters, all of which are sharded by group along dimension 0 so that routing is local."""
        return ()


class RoutingConfig(NamedTuple):
    """Arguments of a router: the mechanism's gate and load balancing, and the router's config."""

    gate: GateName
    balance: BalanceConfig
    router: RouterConfig


class LinearRouterConfig(RouterConfig):
    """r = W x, no bias."""

    type: Literal["linear"] = "linear"
    init_std: float = Field(default=0.02, gt=0, description="initial standard deviation of the rows; must be above 0")
    init: Literal["normal", "equal_rows"] = Field(
        default="normal",
        description="equal_rows: scale all rows to the same norm (SwitchHead), so that no expert is favoured initially",
    )

    def num_params(self, *, width: int, groups: int, experts: int) -> int:
        return width * groups * experts

    def build(self, routing: RoutingConfig, *, width: int, groups: int, experts: int) -> Router:
        return LinearRouter(self, routing, width=width, groups=groups, experts=experts)

    def shards(self) -> tuple[str, ...]:
        return ("w",)


class TwoLayerRouterConfig(RouterConfig):
    """r = W_out silu(W_in x), with `hidden` separate units per group."""

    type: Literal["two_layer"] = "two_layer"
    hidden: int = Field(ge=1, description="hidden units per group")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of W_in; W_out has 1/sqrt(hidden)")

    def num_params(self, *, width: int, groups: int, experts: int) -> int:
        return groups * self.hidden * (width + experts)

    def build(self, routing: RoutingConfig, *, width: int, groups: int, experts: int) -> Router:
        return TwoLayerRouter(self, routing, width=width, groups=groups, experts=experts)

    def shards(self) -> tuple[str, ...]:
        return ("w_in", "w_out")


class QueryNormRouterConfig(RouterConfig):
    """r = |q_m| / (std of |q| over the group), without parameters (MoH-LLaMA3, Jin et al., 2024, arXiv 2410.11842)."""

    type: Literal["query_norm"] = "query_norm"

    @property
    def reads_queries(self) -> bool:
        return True

    def build(self, routing: RoutingConfig, *, width: int, groups: int, experts: int) -> Router:
        return QueryNormRouter(self, routing, groups=groups, experts=experts)


class RandomRouterConfig(RouterConfig):
    """r = W x with a fixed random W. A control that shows the effect of training the router."""

    type: Literal["random"] = "random"
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the fixed rows")

    def flops_per_token(self, *, width: int, groups: int, experts: int) -> int:
        return 2 * width * groups * experts

    def build(self, routing: RoutingConfig, *, width: int, groups: int, experts: int) -> Router:
        return RandomRouter(self, routing, width=width, groups=groups, experts=experts)


class TokenHashRouterConfig(RouterConfig):
    """r = a fixed random row per token id, so routing does not depend on the context (Roller et al., 2021)."""

    type: Literal["token_hash"] = "token_hash"

    def build(self, routing: RoutingConfig, *, width: int, groups: int, experts: int) -> Router:
        return TokenHashRouter(self, routing, groups=groups, experts=experts)


AnyRouter = Annotated[
    LinearRouterConfig | TwoLayerRouterConfig | QueryNormRouterConfig | RandomRouterConfig | TokenHashRouterConfig,
    Field(discriminator="type"),
]


def of_layer(top_k: list[int], index: int, layers: int) -> int:
    """`top_k` of layer `index`. Raises ValueError if there is not one number per layer."""
    if len(top_k) != layers:
        raise ValueError(
            f"attention.top_k: {len(top_k)} numbers for {layers} layers; "
            f"give {layers} numbers, or one integer for all layers"
        )
    return top_k[index]


def check_router(
    router: AnyRouter, balance: BalanceConfig, *, gate: str, choice: bool, hard: str = "gate: hard"
) -> None:
    """Raise ValueError for combinations of router, gate and balancing that cannot work.

    `gate`: factor on the selected experts; "hard" if the task loss gives the router no gradient. `hard` is the field
    and value of the mechanism that say so, for the message. `choice`: whether the router ever selects fewer experts
    than there are.
    """
    if router.reads_queries and gate in ("sigmoid", "sigmoid2"):
        raise ValueError(
            f"gate: logits of {router.type} are norms far above 0, where a sigmoid saturates; "
            f"use gate straight_through or detached_renorm, or router.type linear"
        )
    if router.reads_queries and balance.loss_free_rate:
        raise ValueError(
            f"balance: loss_free_rate adds a bias to sigmoid(r), but logits of {router.type} are norms far above 0, "
            f"where it saturates, so only the bias would decide; use balance.f_p, or router.type linear"
        )
    trained = router.num_params(width=1, groups=1, experts=1) > 0
    if gate == "hard" and choice and trained and not balance.has_loss:
        raise ValueError(
            f"{hard} without a balancing loss gives the router no gradient; "
            "use balance.f_p 0.01, or router.type random for a fixed router"
        )


class Router(FixedBuffers):
    """Scores, selection, gates, load balancing and statistics. Subclasses implement `logits`.

    Tensor parallelism shards the buffers by group, along dimension 0. `ranks` is set where the groups are sharded.
    """

    bias: Tensor
    gate: GateName
    ranks: Ranks = Ranks()

    def __init__(self, config: RouterConfig, routing: RoutingConfig, *, groups: int, experts: int) -> None:
        super().__init__()
        self.config, self.gate, self.balance, self.experts = config, routing.gate, routing.balance, experts
        self.meter = RouterMeter()
        if self.balance.loss_free_rate:
            self.register_buffer("bias", torch.zeros(groups, experts, dtype=torch.float32))

    def logits(self, x: Tensor, context: Context, queries: Tensor | None) -> Tensor:
        """x [B, S, d] -> [B, S, G, N], fp32 or wider."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context, *, k: int, queries: Tensor | None = None) -> Routing:
        """x [B, S, d] -> k experts per group. queries [B, S, G, N, D] are required if the config `reads_queries`."""
        logits = self.logits(x, context, queries)
        idx = context.choice(lambda: top_k(self._scores(logits.detach()), k), self.experts)
        gate = gates(logits, idx, self.gate)
        return Routing(idx, gate, self._account(logits, idx, gate, context, k) if self.training else None)

    def _account(self, logits: Tensor, idx: Tensor, gate: Tensor, context: Context, k: int) -> Tensor | None:
        """Update the statistics and return the balancing loss, or None if there is none."""
        mean, has_loss = context.sequence.mean, self.balance.has_loss
        # The condition must not use `context.counts`: a recomputation must save the same tensors as the first pass.
        if fused(logits) and self.balance.needs_sums_alone and not self.meter.closely:
            counts, shares = balance_sums(logits, idx, sigmoid=self.gate in SIGMOIDS)  # [B, G, N]: one pass
            if context.counts:
                self.meter.count(counts.sum(0))
            return self.balance.loss_of_sums(counts, shares, idx.shape[1], slots=k, mean=mean) if has_loss else None
        chosen = torch.zeros_like(logits).scatter(-1, idx, 1.0)
        if context.counts:
            self.meter.update(logits.detach(), chosen, gate.detach(), context.tokens)
        return self.balance.loss(logits, self._probabilities(logits), chosen, slots=k, mean=mean) if has_loss else None

    def _scores(self, logits: Tensor) -> Tensor:
        """Scores by which experts are ranked; without gradient."""
        scores = logits
        if self.training and self.config.noise == "normal":
            scores = scores + self.config.noise_scale * self._drawn(torch.randn, scores)
        elif self.training and self.config.noise == "gumbel":
            uniform = self._drawn(torch.rand, scores).clamp_min(1e-20)
            scores = scores - self.config.noise_scale * torch.log(-torch.log(uniform))
        if self.balance.loss_free_rate:  # published for sigmoid scores; noise is still added to the logits
            scores = torch.sigmoid(scores) + self.bias
        if self.training and self.config.dropout:
            # Not -inf: if fewer than k experts remain, the best dropped ones are selected.
            scores = scores - 1e4 * (self._drawn(torch.rand, scores) < self.config.dropout)
        return scores

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        """Random numbers for the scores [B, S, G, N] of this rank's groups.

        Every rank draws the numbers of all groups. The generators of the tensor-parallel ranks therefore stay in the
        same state, and each group gets the same numbers as on a single device.
        """
        batch, seq_len, groups, experts = like.shape
        everyones = draw(batch, seq_len, groups * self.ranks.count, experts, dtype=like.dtype, device=like.device)
        return everyones.narrow(2, groups * self.ranks.index, groups)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Router probabilities over a group's experts, for the balancing loss: softmax, or normalized sigmoids."""
        if self.gate not in SIGMOIDS:
            return torch.softmax(logits, -1)
        score = torch.sigmoid(logits)
        return score / score.sum(-1, keepdim=True)

    @torch.no_grad()
    def after_step(self, load: Tensor) -> None:
        """Update the loss-free balancing bias (Wang et al., 2024, arXiv 2408.15664) from the global load [G, N]."""
        if self.balance.loss_free_rate:
            load = load.to(self.bias)
            self.bias += self.balance.loss_free_rate * torch.sign(load.mean(-1, keepdim=True) - load)


class LinearRouter(Router):
    """w [G N, d]."""

    def __init__(
        self, config: LinearRouterConfig, routing: RoutingConfig, *, width: int, groups: int, experts: int
    ) -> None:
        super().__init__(config, routing, groups=groups, experts=experts)
        self.w = parameter(groups * experts, width)
        self.init_stds = {"w": config.init_std}
        self._equal_rows = config.init == "equal_rows"

    def after_init(self) -> None:
        """Scale rows to the same norm, the RMS of their norms. SwitchHead's authors use nearly equal norms."""
        if self._equal_rows:
            norms = self.w.norm(dim=1, keepdim=True)
            self.w *= norms.square().mean().sqrt() / norms

    def logits(self, x: Tensor, context: Context, queries: Tensor | None) -> Tensor:
        return router_logits(x, self.w, self.w.shape[0] // self.experts)


class TwoLayerRouter(Router):
    """w_in [G h, d], w_out [G, N, h]."""

    def __init__(
        self, config: TwoLayerRouterConfig, routing: RoutingConfig, *, width: int, groups: int, experts: int
    ) -> None:
        super().__init__(config, routing, groups=groups, experts=experts)
        self.w_in = parameter(groups * config.hidden, width)
        self.w_out = parameter(groups, experts, config.hidden)
        self.init_stds = {"w_in": config.init_std, "w_out": config.hidden**-0.5}

    def logits(self, x: Tensor, context: Context, queries: Tensor | None) -> Tensor:
        hidden = F.silu(router_logits(x, self.w_in, self.w_out.shape[0]))  # [B, S, G, h]
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("bsgh,gnh->bsgn", hidden, self.w_out.to(hidden.dtype))


class QueryNormRouter(Router):
    """No parameters."""

    def logits(self, x: Tensor, context: Context, queries: Tensor | None) -> Tensor:
        assert queries is not None, "the mechanism must pass all queries to a router that reads them"
        wide = torch.promote_types(queries.dtype, torch.float32)
        norm = torch.linalg.vector_norm(queries, dim=-1, dtype=wide)  # a conversion before would keep 4 bytes a channel
        return norm / norm.std(-1, keepdim=True, correction=0).clamp_min(1e-6)


class RandomRouter(Router):
    """w [G N, d] is a buffer, which is saved but not trained."""

    w: Tensor

    def __init__(
        self, config: RandomRouterConfig, routing: RoutingConfig, *, width: int, groups: int, experts: int
    ) -> None:
        super().__init__(config, routing, groups=groups, experts=experts)
        self.register_buffer("w", torch.empty(groups * experts, width))
        self.init_stds = {"w": config.init_std}

    def logits(self, x: Tensor, context: Context, queries: Tensor | None) -> Tensor:
        return router_logits(x, self.w, self.w.shape[0] // self.experts)


class TokenHashRouter(Router):
    """table [G, buckets, N] is a buffer of standard normal numbers. Equal ids have equal logits in any context."""

    table: Tensor

    def __init__(self, config: TokenHashRouterConfig, routing: RoutingConfig, *, groups: int, experts: int) -> None:
        super().__init__(config, routing, groups=groups, experts=experts)
        self.register_buffer("table", torch.empty(groups, HASH_BUCKETS, experts))
        self.init_stds = {"table": 1.0}

    def logits(self, x: Tensor, context: Context, queries: Tensor | None) -> Tensor:
        assert context.tokens is not None, "the decoder passes the token ids"
        rows = self.table[:, context.tokens % HASH_BUCKETS]  # [G, B, S, N]
        return rows.permute(1, 2, 0, 3).to(torch.promote_types(x.dtype, torch.float32))


class RoutedAttention(Attention):
    """Attention module that reports statistics for its child routers, by child name."""

    @property
    def routers(self) -> dict[str, Router]:
        return {name: child for name, child in self.named_children() if isinstance(child, Router)}

    def router_stats(self) -> dict[str, RouterStats]:
        stats = {name: (router, router.meter.stats()) for name, router in self.routers.items()}
        return {n: stat._replace(cut=router.ranks.count > 1) for n, (router, stat) in stats.items() if stat is not None}

    def watch_routers(self, *, closely: bool) -> None:
        for router in self.routers.values():
            router.meter.closely = closely

    def reset_router_stats(self) -> None:
        for router in self.routers.values():
            router.meter.reset()

    def after_step(self, global_load: dict[str, Tensor]) -> None:
        for name, load in global_load.items():
            self.routers[name].after_step(load)


def summed(*losses: Tensor | None) -> Tensor | None:
    """Sum of the losses that are not None (scalars of one dtype), or None."""
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present).sum() if present else None
