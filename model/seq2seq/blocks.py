"""The decoder's block of an encoder-decoder: self-attention, cross attention, MLP.

Legend: B batch, S target tokens, d width.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from torch import Tensor

from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Shard
from headway.model.config import ModelConfig
from headway.model.decoder import Block, Placement, drop
from headway.model.dropout import Drops
from headway.model.init import initialise
from headway.model.layers import OutputBias, make_add_norm, use_operations
from headway.model.shard import cut_attention


class CrossBlock(Block):
    """One block: x = x + attention(norm(x)), x = x + cross(norm(x), encoder), x = x + mlp(norm(x)).

    Cross attention is the same mechanism, with parameters of its own: its queries are of x, its keys and values of the
    encoder's output (`Context.across`). Dropout of its output has the seeds of the next layer, so that a block takes
    two (`Drops.at`).
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__(model, attention)
        self.cross_norm = make_add_norm(model)
        self.cross: Attention = attention.build(
            width=model.width, layers=model.layers, init_std=model.init_std, norm_eps=model.norm_eps
        )
        self.cross_out = OutputBias(model.width) if attention.output_bias else None

    @property
    def shards(self) -> dict[str, Shard]:
        return super().shards | {f"cross.{name}": shard for name, shard in self._attention_shards.items()}

    def place(self, placement: Placement) -> None:
        super().place(placement)
        use_operations(self.cross, placement.operations)
        cut_attention(self.cross, self._attention_shards, placement.ranks)

    def plain(self, x: Tensor, context: Context, drops: Drops | None) -> AttentionOutput:
        assert context.across is not None, "`EncoderDecoder` gives a block the context of its cross attention"
        enter, leave = self.placement.ranks.enter, self.placement.ranks.leave
        with self.selective or nullcontext():
            y, aux_loss, _ = self.attn(enter(self.attn_norm(x)), context)
            y = leave(y)
            y = y if self.attn_out is None else self.attn_out(y)
            x, normed = self.cross_norm(x, drop(drops, y, "attention", self.placement))
            y, cross_loss, _ = self.cross(enter(normed), context.across)
            y = leave(y)
            y = y if self.cross_out is None else self.cross_out(y)
            second = None if drops is None else drops.at(drops.layer + 1)
            x, normed = self.mlp_norm(x, drop(second, y, "attention", self.placement))
            hidden = partial(drop, drops, place="hidden", placement=self.placement)
            z = leave(self.mlp(enter(normed), hidden))
            z = z if self.mlp_out is None else self.mlp_out(z)
            if aux_loss is not None and cross_loss is not None:
                aux_loss = aux_loss + cross_loss
            return AttentionOutput(x + drop(drops, z, "mlp", self.placement), aux_loss)


def make_stack_block(
    kind: type[Block], model: ModelConfig, attention: AttentionConfig, name: str, *, seed: int, placement: Placement
) -> Block:
    """Build and initialize this rank's part of the block `name`, such as "encoder.0".

    Without the factor 1/sqrt(D) of scores (T5), query matrices start smaller by it, so that scores start alike.
    """
    block = kind(model, attention)
    initialise(block, seed=seed, prefix=f"{name}.")
    if model.positions == "relative_t5":
        for layer in (block.attn, *([block.cross] if isinstance(block, CrossBlock) else [])):
            query = layer.get_parameter("w_q")
            query.data.mul_(attention.head_dim**-0.5)
    block.place(placement)
    return block
