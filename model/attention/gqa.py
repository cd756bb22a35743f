"""Grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245), its limits MHA and MQA, and its options.

Legend: B batch, S sequence, d width, H query heads, G KV heads (= groups), m_g query heads of group g, D head size,
w_g window of group g. Head h of group g, at position t:

    o_h = softmax over s in (t - w_g, t] of (q_h(t) K_g(s)^T / sqrt(D))  V_g(s)
    y   = W_O [gate_1 o_1 .. gate_H o_H]

gate: none, or sigmoid(W_gate x) with one number per head (headwise) or per head and channel (elementwise). It is not
scaled, so it is about 1/2 at the start of training (Qiu et al., 2025, arXiv 2505.06708).
windows: w_g keys, including the token's own; none: all earlier tokens.
group_sizes: m_g, given for each group (AsymGQA, Chen et al., 2024, arXiv 2406.14963). The paper does not describe its
search for the sizes; headway.model.convert.grouping proposes sizes and groupings.
value_residual, share_kv: values, or keys and values, of earlier layers (`headway.model.attention.across`).
Equal groups without gates and windows are the published GQA.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from headway.model.attention.across import AcrossConfig
from headway.model.attention.grouped import GroupedQueryAttention, check_groups, uneven_orthogonality_loss
from headway.model.base import Attention, AttentionOutput, Context, Flops, HeadPool, RelativeForm, Shard, visible_keys
from headway.model.layers import parameter

Window = Annotated[int, Field(ge=1)]
Windows = Window | list[Window | None] | None


class DenseConfig(AcrossConfig):
    """Options of the mechanisms that use all their query heads for every token."""

    gate: Literal["none", "headwise", "elementwise"] = Field(
        default="none",
        description="sigmoid of the layer's input as a factor on the output of each head, or of each of its channels",
    )
    biases: bool = Field(default=False, description="biases of the query, key, value and output projections")
    windows: Windows = Field(
        default=None, description="tokens a query attends to, including itself; a list: one per KV head; null: all"
    )
    window_pattern: list[Windows] = Field(
        default=[], description="`windows` per layer, starting at the first layer; the list repeats to the last layer"
    )

    @model_validator(mode="after")
    def _windows_fit_the_groups(self) -> Self:
        if self.window_pattern and self.share_kv > 1:
            raise ValueError(
                f"share_kv: {self.share_kv} layers have one KV cache, and window_pattern gives layers other windows; "
                "use windows, or share_kv 1, or kinds of type mixed, each with its windows and share_kv"
            )
        if self.window_pattern and self.windows is not None:
            raise ValueError(
                "window_pattern: `windows` is set too, and applies to all layers; use windows alone, or window_pattern "
                "alone"
            )
        entries = [("windows", self.windows), *(("window_pattern", entry) for entry in self.window_pattern)]
        for name, entry in entries:
            if isinstance(entry, list) and len(entry) != self.groups:
                raise ValueError(
                    f"{name}: {entry} has {len(entry)} windows for {self.groups} KV heads; "
                    f"use a list of {self.groups}, or one integer for all of them"
                )
        return self

    def layer(self, index: int, layers: int) -> Self:
        placed = super().layer(index, layers)
        if not self.window_pattern:
            return placed
        if len(self.window_pattern) > layers:
            raise ValueError(
                f"attention.window_pattern: {len(self.window_pattern)} entries for {layers} layers; "
                f"use {layers} entries at most, or model.layers {len(self.window_pattern)}"
            )
        windows = self.window_pattern[index % len(self.window_pattern)]
        return placed.model_copy(update={"windows": windows, "window_pattern": []})

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        super().check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
        name = "window_pattern" if self.window_pattern else "windows"
        for entry in [self.windows, *self.window_pattern]:
            longest = max((w for w in (entry if isinstance(entry, list) else [entry]) if w is not None), default=0)
            if longest > seq_len:
                raise ValueError(
                    f"attention.{name}: a window of {longest} tokens is longer than the sequences of {seq_len}; "
                    f"use null (all tokens) or {seq_len} at most, or data.seq_len {longest}"
                )

    @property
    def group_windows(self) -> list[int | None]:
        """Window of each group, None: global. Needs a config of one layer (`layer`)."""
        assert not self.window_pattern, "windows differ by layer: ask the config of one layer"
        return list(self.windows) if isinstance(self.windows, list) else [self.windows] * self.groups

    @property
    def sizes(self) -> list[int]:
        """Query heads of each group."""
        return [self.heads_per_group] * self.groups

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """One call per distinct window. Groups of different sizes get one copy of the KV head per query head."""
        calls = []
        for window in dict.fromkeys(self.group_windows):
            sizes = [size for size, own in zip(self.sizes, self.group_windows, strict=True) if own == window]
            calls.append((len(sizes) if len(set(sizes)) == 1 else sum(sizes)) // tensor)
        return tuple(calls)

    def handed_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """V of the first layer; K and V of each call of the core of a layer that others read."""
        if self.across != "share_kv":
            return () if self.across is None else (self.groups // tensor,)
        windows = self.group_windows
        return tuple(windows.count(window) // tensor for window in dict.fromkeys(windows) for _ in range(2))

    @property
    def output_bias(self) -> bool:
        return self.biases

    @property
    def relative_form(self) -> RelativeForm | None:
        """As Dai et al., with u and v; not with windows or groups of different sizes, which attend in several calls."""
        if self.windows is not None or self.window_pattern or len(set(self.sizes)) > 1:
            return None
        return RelativeForm(self.groups, self.query_heads)

    @property
    def no_encoder_decoder(self) -> str | None:
        reason = super().no_encoder_decoder
        if reason is not None or (self.windows is None and not self.window_pattern):
            return reason
        key = "window_pattern" if self.window_pattern else "windows"
        return (
            f"attention.{key}: windows count keys before a query, and the encoder and cross attention see all keys; "
            f"leave attention.{key} out, or use model.type decoder"
        )

    @property
    def gate_rows(self) -> int:
        """Rows of W_gate."""
        return {"none": 0, "headwise": 1, "elementwise": self.head_dim}[self.gate] * self.query_heads

    def core_flops_per_token(self, *, seq_len: int) -> float:
        """4D per query head and visible key of its group."""
        per_group = zip(self.sizes, self.group_windows, strict=True)
        return 4 * self.head_dim * sum(size * visible_keys(seq_len, window) for size, window in per_group)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return DenseAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dHD + 2dGD, plus dH or dHD for the gate, plus HD + 2GD + d for biases; less where a layer reads K and V."""
        projected = self.query_heads + (0 if self.reads_kv else 2 * self.groups)
        biases = projected * self.head_dim + width if self.biases else 0
        return super().num_params(width=width) + width * self.gate_rows + biases

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """4dHD + 4dGD, 2dH or 2dHD for the gate, and the core. Multiplying by the gate is not counted."""
        gate = 2 * width * self.gate_rows
        return super().flops_per_token(width=width, seq_len=seq_len) + Flops(useful=gate, executed=gate)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """A group with a window of w keeps the last w - 1 tokens. A layer that reads those of another keeps none."""
        if self.reads_kv:
            return 0.0
        kept = sum(seq_len if w is None else min(seq_len, w - 1) for w in self.group_windows)
        return 2 * self.head_dim * bytes_per_element * kept / seq_len

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole groups. Where groups differ, it owns whole repetitions of their pattern (equal work)."""
        groups = list(zip(self.sizes, self.group_windows, strict=True))
        units = max(n for n in range(1, len(groups) + 1) if groups == groups[: len(groups) // n] * n)
        names = {"w_q": 0, "w_o": 1} | ({} if self.reads_kv else {"w_k": 0, "w_v": 0})
        names |= {} if self.gate == "none" else {"w_gate": 0}
        names |= {name.replace("w_", "b_"): 0 for name in ("w_q", "w_k", "w_v") if self.biases and name in names}
        return {name: Shard(dim, units) for name, dim in names.items()}


class GqaConfig(DenseConfig):
    """GQA: G KV heads, each shared by H/G query heads or by the number that `group_sizes` gives."""

    type: Literal["gqa"] = "gqa"
    crosses: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = True
    kv_heads: int = Field(ge=1, description="G, KV heads; each serves heads/kv_heads query heads")
    group_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="query heads of each KV head; empty: equal groups"
    )

    @model_validator(mode="after")
    def _group_sizes_add_up(self) -> Self:
        sizes, heads, groups = self.group_sizes, self.heads, self.kv_heads
        if not sizes:
            check_groups(heads, groups)
        elif len(sizes) != groups:
            raise ValueError(
                f"group_sizes: {len(sizes)} sizes for {groups} KV heads; use {groups} sizes, or kv_heads {len(sizes)}"
            )
        elif sum(sizes) != heads:
            raise ValueError(
                f"group_sizes: {sizes} add up to {sum(sizes)} of {heads} query heads; "
                f"use sizes that add up to {heads}, or heads {sum(sizes)}"
            )
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def sizes(self) -> list[int]:
        return list(self.group_sizes) or super().sizes


class MhaConfig(DenseConfig):
    """Multi-head attention: GQA with one query head per KV head."""

    type: Literal["mha"] = "mha"
    crosses: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = True

    @property
    def groups(self) -> int:
        return self.heads


class MqaConfig(DenseConfig):
    """Multi-query attention: GQA with a single KV head."""

    type: Literal["mqa"] = "mqa"
    crosses: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = True

    @property
    def groups(self) -> int:
        return 1


class Parts(NamedTuple):
    """Keys and values that a layer attends to, a pair [B, K, n, D] for each call of the core; what it hands on."""

    calls: list[tuple[Tensor, Tensor]]
    handed: tuple[Tensor, ...] = ()


class DenseAttention(GroupedQueryAttention):
    """GQA with its options. `w_gate` is [H, d] or [H D, d]; the core is called once per distinct window.

    A layer that reads the keys and values of another one has no `w_k`, `w_v` and `k_rope`. `mix_first` and `mix_own`
    [1] are l_1 and l_2 of learned value residuals.

    A tensor-parallel rank reads the sizes and windows of its groups from the start of the lists. This is correct
    because its groups are whole repetitions of the pattern.
    """

    gate_matrices = ("w_gate",)
    mix_first: nn.Parameter | None
    mix_own: nn.Parameter | None

    def __init__(self, config: DenseConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.gate, self.sizes, self.windows = config.gate, config.sizes, config.group_windows
        self.even = len(set(self.sizes)) == 1
        self.across = config.across is not None
        self.reads_kv, self.mixes_values = config.reads_kv, config.mixes_values
        self.hands_on = config.across if config.takes_from is None else None
        if config.biases:
            for name in ("b_q", "b_k", "b_v"):
                self.register_parameter(name, parameter(len(self.get_parameter(name.replace("b_", "w_")))))
                self.init_stds[name] = 0.0
        if config.reads_kv:
            del self.w_k, self.w_v, self.b_k, self.b_v, self.k_rope
            self.init_stds = {name: std for name, std in self.init_stds.items() if hasattr(self, name)}
        learned = config.mixes_values and config.value_residual == "learned"
        for name in ("mix_first", "mix_own"):
            self.register_parameter(name, parameter(1) if learned else None)
        if learned:
            self.init_stds |= {"mix_first": 0.0, "mix_own": 0.0}
            self.init_means = {"mix_first": 0.5, "mix_own": 0.5}
        if config.gate != "none":
            self.w_gate = parameter(config.gate_rows, width)
            self.init_stds["w_gate"] = init_std

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q = self.q_rope(self.heads_of(x, self.w_q, self.b_q), context.rope)  # [B, S, H, D]
        o, handed = self._attended(q, x, context)
        if self.gate != "none":
            o = o * torch.sigmoid(F.linear(x, self.w_gate)).unflatten(-1, (o.shape[2], -1))  # [B, S, H, 1 or D]
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), self.diversity_loss(), handed)

    def _attended(self, q: Tensor, x: Tensor, context: Context) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o [B, S, H, D], and what the layer hands on."""
        if not self.across:  # mechanisms of packages may have their own `attend`
            return self.attend(q, x, context), ()
        parts = self.parts(x, context)
        return self.attend_to(q, parts, context), parts.handed

    def attend(self, q: Tensor, x: Tensor, context: Context) -> Tensor:
        return self.attend_to(q, self.parts(x, context), context)

    def parts(self, x: Tensor, context: Context) -> Parts:
        """Keys and values of the tokens that x attends to, cached ones included: one pair per distinct window."""
        if context.source is not None:
            return Parts([self.keys_and_values(x, context)])
        if self.reads_kv:
            return Parts(list(zip(context.handed[::2], context.handed[1::2], strict=True)))
        k, v = self.kv_heads(x, context.rope)  # [B, S, G, D]
        if self.mixes_values:
            v = self.mixed(v, context)
        windows = self.windows[: k.shape[2]]
        if self.even and len(set(windows)) == 1:
            calls = [context.keys_and_values(k, v, window=windows[0])]
        else:
            calls = []
            for window in dict.fromkeys(windows):
                groups = [g for g, w in enumerate(windows) if w == window]
                own_k, own_v = (take(t, [1] * len(windows), groups) for t in (k, v))
                calls.append(context.keys_and_values(own_k, own_v, part=str(window), window=window))
        if self.hands_on == "share_kv":
            return Parts(calls, tuple(heads for pair in calls for heads in pair))
        return Parts(calls, (v,) if self.hands_on == "value_residual" else ())

    def mixed(self, v: Tensor, context: Context) -> Tensor:
        """l_1 V_1 + l_2 V, of the new tokens [B, S, G, D]: the cache has mixed values."""
        (first,) = context.handed
        if self.mix_first is None or self.mix_own is None:
            return 0.5 * (first + v)
        return self.mix_first * first + self.mix_own * v

    def heads_of_calls(self) -> list[list[int]]:
        """For each call of the core, one per distinct window, the query heads that it computes, in its order."""
        ends = list(accumulate(self.sizes, initial=0))
        heads = [list(range(begin, end)) for begin, end in pairwise(ends)]
        return [
            [head for own, w in zip(heads, self.windows, strict=True) if w == window for head in own]
            for window in dict.fromkeys(self.windows)
        ]

    def attend_to(self, q: Tensor, parts: Parts, context: Context) -> Tensor:
        """Attend with rotated queries q [B, S, H, D] -> o [B, S, H, D]."""
        count = sum(k.shape[2] for k, _ in parts.calls)
        sizes, windows = self.sizes[:count], self.windows[:count]
        if len(parts.calls) == 1:
            ((k, v),) = parts.calls
            return context.attend(q, share(k, sizes), share(v, sizes), window=windows[0])
        outputs: dict[int, Tensor] = {}  # by group
        for window, (own_k, own_v) in zip(dict.fromkeys(windows), parts.calls, strict=True):
            groups = [g for g, w in enumerate(windows) if w == window]
            own_sizes = [sizes[g] for g in groups]
            own_k, own_v = share(own_k, own_sizes), share(own_v, own_sizes)
            o = context.attend(take(q, sizes, groups), own_k, own_v, window=window)
            outputs.update(zip(groups, o.split(own_sizes, 2), strict=True))
        return torch.cat([outputs[g] for g in range(len(sizes))], 2)

    def diversity_loss(self) -> Tensor | None:
        if self.even or not self.orthogonality or not self.training:
            return super().diversity_loss()
        heads = len(self.w_q) // self.head_dim
        groups = len(self.sizes) * heads // sum(self.sizes)  # of this rank: whole repetitions of the pattern
        sizes = torch.tensor(self.sizes[:groups], device=self.w_q.device)
        return self.orthogonality * uneven_orthogonality_loss(self.w_q, sizes, head_dim=self.head_dim)

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """The query heads of each group; None where groups differ in size."""
        return super().pool(x, context) if self.even else None


def take(heads: Tensor, sizes: list[int], groups: list[int]) -> Tensor:
    """Heads of the given `groups`, from heads [B, S, n, D] with `sizes` [G] consecutive heads per group.

    The result is a view where the groups are adjacent.
    """
    first, last = groups[0], groups[-1]
    if last - first + 1 == len(groups):
        return heads.narrow(2, sum(sizes[:first]), sum(sizes[first : last + 1]))
    parts = heads.split(sizes, 2)
    return torch.cat([parts[g] for g in groups], 2)


def share(heads: Tensor, sizes: list[int]) -> Tensor:
    """KV heads [B, K, G, D] -> [B, K, sum of sizes, D], one per query head; unchanged for equal sizes.

    The attention core shares KV heads among groups of equal size without copies.
    """
    if len(set(sizes)) == 1:
        return heads
    parts = zip(heads.unbind(2), sizes, strict=True)
    return torch.cat([head.unsqueeze(2).expand(-1, -1, size, -1) for head, size in parts], 2)
