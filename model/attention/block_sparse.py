"""Block-sparse attention: GQA whose queries attend to their own block of tokens and to a few earlier ones they choose.

Legend: B batch, S sequence, d width, H query heads, G KV heads (= groups), M=H/G query heads per group, D head size,
P=block tokens of a block, n=blocks chosen blocks, C choosers (G groups, or H heads). Blocks are counted from the start
of a document. At position t, for group g:

    mean_j = mean of the rotated keys K_g of block j                       of each complete block j before that of t
    chosen = the n blocks with the largest q . mean_j, q = mean of the group's rotated queries at t    no gradient
    o_h    = softmax over s <= t in t's own block and in the chosen blocks of (q_h(t) K_g(s)^T / sqrt(D))  V_g(s)
    y      = W_O [o_1 .. o_H]

Source: MoBA (Lu et al., 2025, arXiv 2502.13189; the authors' plain PyTorch form was read). It chooses for each query
head (`chosen_by: head`), and counts the own block among its top-k, so top-k 3 is blocks 2. Choices of this project: one
choice per group, so that the heads that share keys and values read the same ones; mean keys in the dtype of the keys;
ties go to the earlier block.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.documents import Documents
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention, check_groups
from headway.model.base import Attention, Context, Flops
from headway.model.blocks import Blocks, choose_blocks, mean_keys


class BlockSparseConfig(GroupedConfig):
    """GQA with chosen blocks: parameters, names and initial values are those of `gqa`."""

    type: Literal["block_sparse"] = "block_sparse"
    own_core: ClassVar[bool] = True
    no_context_parallel: ClassVar[str | None] = (
        "attention.type block_sparse chooses among the blocks of a whole sequence, in a core of its own that knows no "
        "parts of sequences"
    )
    kv_heads: int = Field(ge=1, description="G, KV heads; each serves heads/kv_heads query heads")
    block: int = Field(ge=1, description="P, tokens of a block; published: 512 for 8,192 tokens")
    blocks: int = Field(
        ge=1, description="earlier blocks that a query attends to besides its own; published: 2, as a top-k of 3"
    )
    chosen_by: Literal["group", "head"] = Field(
        default="group",
        description="group: one choice for the query heads of a KV head; head: each its own, as published",
    )

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        return self

    def check_run(self, *, seq_len: int, tokens: int, tokens_per_step: int) -> None:
        super().check_run(seq_len=seq_len, tokens=tokens, tokens_per_step=tokens_per_step)
        if self.block >= seq_len:
            raise ValueError(
                f"attention.block: a block of {self.block} tokens leaves no earlier block to choose in sequences of "
                f"{seq_len}; use attention.block {max(1, seq_len // 4)}, or data.seq_len {4 * self.block}"
            )

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def choosers(self) -> int:
        """C."""
        return self.groups if self.chosen_by == "group" else self.heads

    @property
    def reads_routing(self) -> bool:
        return True

    @property
    def complete_tokens(self) -> int:
        """(n + 1)P, tokens of the longest sequence in which each token chooses all its earlier blocks."""
        return (self.blocks + 1) * self.block

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return BlockSparseAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def seen_keys(self, *, seq_len: int) -> float:
        """Keys that a token attends to, itself included, averaged over a sequence of one document.

        (t mod P) + 1 in the own block of position t, and P in each of min(n, floor(t / P)) chosen blocks.
        """
        full, rest = divmod(seq_len, self.block)
        own = full * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        few = min(full, self.blocks + 1)  # blocks whose tokens have fewer than n candidates, or exactly n
        chosen = self.block * (few * (few - 1) // 2 + (full - few) * self.blocks) + rest * min(full, self.blocks)
        return (own + self.block * chosen) / seq_len

    def core_flops_per_token(self, *, seq_len: int) -> float:
        """4D per query head and key of the own and the chosen blocks. Masked and padded scores are not counted."""
        return 4 * self.head_dim * self.heads * self.seen_keys(seq_len=seq_len)

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """4dHD + 4dGD, the core, and the choice: 2D per chooser and candidate, and the sums of the means.

        Executed: products with the means of all complete blocks, candidates or not.
        """
        full, rest = divmod(seq_len, self.block)
        candidates = (self.block * full * (full - 1) // 2 + rest * full) / seq_len
        fixed = super().flops_per_token(width=width, seq_len=seq_len).useful + self.gating_flops_per_token()
        each = 2 * self.head_dim * self.choosers
        return Flops(useful=fixed + each * candidates, executed=fixed + each * full)

    def gating_flops_per_token(self) -> int:
        """Sums of the means: GD of keys, and HD of queries where the heads of a group choose together."""
        queries = self.heads if self.choosers < self.heads else 0
        return (self.groups + queries) * self.head_dim

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        """Those of gqa, and a mean key of each group for P tokens.

        A new token reads the keys and values of at most n + 1 blocks (with `chosen_by: head`, of each head), and the
        means of all complete blocks.
        """
        means = seq_len // self.block / seq_len
        return (2 + means) * self.groups * self.head_dim * bytes_per_element


class BlockSparseAttention(GroupedQueryAttention):
    """The layer: parameters are those of `GroupedQueryAttention`."""

    def __init__(self, config: BlockSparseConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.block, self.blocks, self.by_group = config.block, config.blocks, config.chosen_by == "group"

    def attend(self, q: Tensor, x: Tensor, context: Context) -> Tensor:
        k, v = self.keys_and_values(x, context)
        past = k.shape[1] - q.shape[1]
        documents = context.documents or Documents(((k.shape[1],),) * len(k), past)
        blocks = Blocks.of(documents, self.block, k.device)
        means = blocks.means(k) if context.cache is None else self.cached_means(k, past, context)
        choosers = k.shape[2] if self.by_group else q.shape[2]

        def choose() -> Tensor:
            return choose_blocks(q, means, blocks, count=self.blocks, choosers=choosers)

        return context.attend_blocks(q, k, v, context.choice(choose, blocks.count + 1), blocks)

    def cached_means(self, k: Tensor, past: int, context: Context) -> Tensor:
        """Mean keys [B, N, G, D] of cached and new tokens, k [B, K, G, D]: only those of new blocks are computed."""
        assert context.cache is not None
        first, last = past // self.block, k.shape[1] // self.block
        new = k.detach()[:, first * self.block : last * self.block].unflatten(1, (last - first, self.block))
        new = mean_keys(new)
        return context.cache.extend(new, new[..., :0], part="means", window=None)[0]
