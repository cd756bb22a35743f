"""SwitchHead (Csordas et al., 2024, arXiv 2312.07987v3): values and output projections are mixtures of experts.

Legend: B batch, S sequence, d width, n heads, E experts per head, k=top_k, D head size. For head h:

    Q = W_Q x,  K = W_K x                              dense, one of each per head
    V(s) = sum over e in top-k of sigmoid(W_SV x_s) of  sigmoid(r_e) W_V[e] x_s    source: the token that is attended to
    y(t) = sum over e in top-k of sigmoid(W_SO x_t) of  sigmoid(r_e) W_O[e] (A V)  destination: the querying token

Gates are independent sigmoids, not renormalised; there is no auxiliary loss. With n=G and E=M this is the dual of
R-GQA: equal projection weights, equal projection FLOPs up to the gating products, equal KV cache; R-GQA has a pool of
query and output slices and k G score maps, SwitchHead a pool of value and output slices and G score maps.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.attention import core
from headway.kernels.routing import expand, router_logits, select, top_k
from headway.model.attention.gqa import QkNorm
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Flops, RouterStats, Shard
from headway.model.layers import parameter
from headway.model.router import RouterMeter, chosen_mask


class SwitchHeadConfig(AttentionConfig):
    """SwitchHead: n heads with dense queries and keys; values and outputs are mixtures of experts.

    The authors rotate half of the channels (rope_fraction 0.5) and scale the initial weights by the fan-in; the
    defaults here are those of the other mechanisms, so that a comparison differs in the mechanism alone.
    """

    type: Literal["switchhead"] = "switchhead"
    kv_heads: int = Field(
        ge=1, description="n, heads; each has its own query, key and pools of value and output experts"
    )
    experts: int = Field(ge=1, description="E, value experts and output experts per head")
    top_k: int = Field(ge=1, description="value experts and output experts a token uses per head")
    router_init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        if self.top_k > self.experts:
            legal = "1" if self.experts == 1 else f"1 to {self.experts}"
            raise ValueError(
                f"top_k: {self.top_k} experts picked of {self.experts} per head; "
                f"use top_k {legal}, or experts {self.top_k}"
            )
        return self

    @property
    def score_maps(self) -> int:
        return self.kv_heads

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return SwitchHeadAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dnD + 2dnED + 2dnE, and two gains of D with QK-norm."""
        dense = 2 * width * self.kv_heads * self.head_dim
        gains = 2 * self.head_dim if self.qk_norm else 0
        return dense + dense * self.experts + 2 * width * self.kv_heads * self.experts + gains

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """Useful: 4dnD + 4knD(d+1) + 4dnE and the core; executed: V and O for all E experts instead of k."""
        heads, gating = self.kv_heads * self.head_dim, 4 * self.top_k * self.kv_heads * self.head_dim
        router = 4 * width * self.kv_heads * self.experts
        rest = 4 * width * heads + gating + router + self.core_flops_per_token(seq_len=seq_len)
        per_expert = 4 * width * heads
        return Flops(useful=rest + per_expert * self.top_k, executed=rest + per_expert * self.experts)

    def kv_bytes_per_token(self, *, bytes_per_element: int) -> int:
        return 2 * self.kv_heads * self.head_dim * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """Whole heads with their experts and router rows: routing needs no communication."""
        rows = {name: Shard(0, self.kv_heads) for name in ("w_q", "w_k", "w_v", "w_sv", "w_so")}
        return {**rows, "w_o": Shard(1, self.kv_heads)}


class SwitchHeadAttention(Attention):
    """Parameters w_q, w_k [n D, d]; w_v [n E D, d]; w_o [d, n E D]; routers w_sv, w_so [n E, d]; head-major."""

    def __init__(self, config: SwitchHeadConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        heads, experts, head_dim = config.kv_heads, config.experts, config.head_dim
        self.w_q = parameter(heads * head_dim, width)
        self.w_k = parameter(heads * head_dim, width)
        self.w_v = parameter(heads * experts * head_dim, width)
        self.w_o = parameter(width, heads * experts * head_dim)
        self.w_sv = parameter(heads * experts, width)
        self.w_so = parameter(heads * experts, width)
        self.q_rope = QkNorm(config, norm_eps)
        self.k_rope = QkNorm(config, norm_eps)
        router = config.router_init_std
        self.init_stds = {"w_q": init_std, "w_k": init_std, "w_v": init_std, "w_sv": router, "w_so": router}
        self.init_stds["w_o"] = init_std / (2 * layers) ** 0.5
        self._meters = {"source": RouterMeter(config.top_k), "destination": RouterMeter(config.top_k)}

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> AttentionOutput:
        experts, head_dim = self.config.experts, self.config.head_dim
        q = self.q_rope(F.linear(x, self.w_q).unflatten(-1, (-1, head_dim)), rope)  # [B, S, n, D]
        k = self.k_rope(F.linear(x, self.w_k).unflatten(-1, (-1, head_dim)), rope)  # [B, S, n, D]
        source, source_gate = self._route("source", x, self.w_sv)
        pool = F.linear(x, self.w_v).unflatten(-1, (-1, experts, head_dim))  # [B, S, n, E, D]
        v = (select(pool, source) * source_gate.to(x.dtype).unsqueeze(-1)).sum(-2)  # [B, S, n, D]
        o = core(q, k, v, mask)  # [B, S, n, D]
        destination, gate = self._route("destination", x, self.w_so)
        slots = o.unsqueeze(-2).expand(*destination.shape, head_dim)  # one output, k output experts
        o = expand(slots, destination, gate, experts)  # [B, S, n, E, D]
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), None)

    def forward_reference(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> AttentionOutput:
        """The same function, masked dense: every expert, times its gate, zero where not chosen."""
        experts, head_dim = self.config.experts, self.config.head_dim
        q = self.q_rope(F.linear(x, self.w_q).unflatten(-1, (-1, head_dim)), rope)
        k = self.k_rope(F.linear(x, self.w_k).unflatten(-1, (-1, head_dim)), rope)
        factors = []
        for name, weight in (("source", self.w_sv), ("destination", self.w_so)):
            idx, gate = self._route(name, x, weight)
            factors.append(gate.new_zeros(*idx.shape[:-1], experts).scatter(-1, idx, gate).to(x.dtype))
        pool = F.linear(x, self.w_v).unflatten(-1, (-1, experts, head_dim))
        v = torch.einsum("bsne,bsned->bsnd", factors[0], pool)
        o = core(q, k, v, mask)
        o = torch.einsum("bsne,bsnd->bsned", factors[1], o)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), None)

    def _route(self, name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, d] -> experts [B, S, n, k] and their gates sigmoid(r), fp32 or wider."""
        logits = router_logits(x, weight, weight.shape[0] // self.config.experts)  # [B, S, n, E]
        idx = top_k(logits, self.config.top_k)
        if self.training:
            self._meters[name].update(logits.detach(), chosen_mask(logits.detach(), idx))
        return idx, torch.sigmoid(logits.gather(-1, idx))

    def router_stats(self) -> dict[str, RouterStats]:
        stats = {name: meter.stats() for name, meter in self._meters.items()}
        return {name: stat for name, stat in stats.items() if stat is not None}

    def reset_router_stats(self) -> None:
        for meter in self._meters.values():
            meter.reset()
