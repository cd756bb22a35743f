"""The decoder as a model of Hugging Face transformers: `HeadwayConfig` and `HeadwayForCausalLM`.

Importing this module registers both for `AutoConfig` and `AutoModelForCausalLM`; `import headway.hf` does it by a
shorter name. The model computes what the decoder computes: it holds one.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.loss import IGNORED
from headway.model.decoder import Decoder, DecoderCache
from headway.model.hidden import hidden_if_broken
from headway.model.huggingface.folder import ExportedConfig, WeightsError
from headway.model.huggingface.form import ARCHITECTURE, MODEL_TYPE, read_form

try:
    with hidden_if_broken("torchvision"):
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as e:
    raise ImportError(
        f"headway.hf needs transformers, which cannot be imported ({e}); install it with `pip install 'headway[hf]'`, "
        "or load the folder without it: headway.model.huggingface.form.load_form"
    ) from e


class HeadwayConfig(PretrainedConfig):
    """config.json of a folder that `headway export --to hf` writes for mechanisms without another form.

    model, attention: Sections of a spec. max_position_embeddings: tokens per sequence in training. tokens: trained so
    far; they set the schedules of the mechanism. source: where the weights came from, for people. They are checked when
    a model is built.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        max_position_embeddings: int | None = None,
        tokens: int = 0,
        source: str = "",
        use_cache: bool = True,
        **keys: Any,
    ) -> None:
        self.model, self.attention = model or {}, attention or {}
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.tokens, self.source, self.use_cache = tokens, source, use_cache
        keys.setdefault("tie_word_embeddings", False)  # of transformers; `model.tied_embeddings` ties ours
        super().__init__(**keys)

    @property
    def hidden_size(self) -> int | None:
        return self.model.get("width")

    @property
    def num_hidden_layers(self) -> int | None:
        return self.model.get("layers")

    def exported(self) -> ExportedConfig:
        """The decoder that it describes. Raises WeightsError if a key is missing or invalid."""
        return read_form(self.to_dict(), self.name_or_path or type(self).__name__)


class HeadwayCache:
    """KV cache of `HeadwayForCausalLM`, for one batch of sequences of equal length."""

    is_compileable = False

    def __init__(self, decoder: DecoderCache) -> None:
        self.decoder = decoder

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens; equal in all layers."""
        return self.decoder.tokens

    def get_max_cache_shape(self) -> int:
        """-1: the cache grows without limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError(
            "num_beams: the cache of Headway's models cannot be reordered; use num_beams=1, or use_cache=False"
        )


class HeadwayForCausalLM(PreTrainedModel, GenerationMixin):
    """A Headway decoder of any mechanism.

    Sequences are one document each. A batch has sequences of equal length, or padding on the right in a pass without a
    cache: no token sees the ones after it. Padding on the left would be seen, and is refused. All weights are on one
    device.
    """

    config: HeadwayConfig
    config_class = HeadwayConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _no_split_modules = ("Block",)
    _supports_sdpa = True  # attn_implementation has no effect: the mechanism has its own core
    _is_stateful = True  # transformers makes no cache, and does not try to take tokens back

    def __init__(self, config: HeadwayConfig) -> None:
        super().__init__(config)
        exported = config.exported()
        self.decoder = Decoder(exported.model, exported.attention, vocab_size=exported.vocab_size, seed=0)
        self.decoder.before_step(exported.tokens)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing to do: the decoder initializes itself, and `from_pretrained` needs every tensor in the folder."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of `PreTrainedModel`. Raises WeightsError if a tensor is missing, unknown or of another shape."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, report = loaded
        wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if wrong:
            raise WeightsError(
                f"{args[0] if args else 'the folder'}: tensors do not match config.json (such as {wrong[0]}); restore "
                "the folder, or name another"
            )
        return (model, report) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HeadwayCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, S, V]; with labels also the loss.

        input_ids [B, S]; with `past_key_values` they continue the cached tokens. attention_mask [B, cached + S]: 1 for
        tokens, 0 for padding on the right. labels [B, S]: equal to input_ids, shifted here, -100 for no target; the
        loss is their mean cross entropy in nats, in training plus the auxiliary losses of routers. use_cache: also
        return the cache; default False, `generate` sets it. logits_to_keep: only those of the last so many tokens
        (0: of all), or of these positions. Raises ValueError for what is not supported.
        """
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError("input_ids: missing, or not of shape [B, S]; Headway's models take token ids only")
        if output_attentions or output_hidden_states:
            raise ValueError(
                "output_attentions, output_hidden_states: Headway's models return neither; leave them out, or call "
                "model.decoder"
            )
        cached = past_key_values is not None or bool(use_cache)
        if cached and labels is not None:
            raise ValueError("labels: no loss is computed with a cache; leave out use_cache and past_key_values")
        if past_key_values is not None and not isinstance(past_key_values, HeadwayCache):
            raise ValueError(
                f"past_key_values: {type(past_key_values).__name__} cannot hold what Headway's models cache; pass the "
                "one that the model returned, or None"
            )
        _check_mask(attention_mask, right=not cached)
        loss = None
        if cached:
            past_key_values = past_key_values or HeadwayCache(self.decoder.new_cache())
            logits = self.decoder.logits(
                input_ids, cache=past_key_values.decoder, last=isinstance(logits_to_keep, int) and logits_to_keep == 1
            )
        else:
            targets = None if labels is None else _next_tokens(labels)
            logits, output = self.decoder.logits_and_loss(input_ids, targets, self._dropout_keys(input_ids))
            if output is not None:
                loss = output.loss_sum / output.targets
                loss = loss + output.aux_loss if self.training else loss
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        values: dict[str, Any] = {"loss": loss, "logits": logits, "past_key_values": past_key_values}
        found = CausalLMOutputWithPast(**values)
        return found if (self.config.use_return_dict if return_dict is None else return_dict) else found.to_tuple()

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride] (called by keywords)
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the next tokens: those that are not cached. Raises ValueError for padding."""
        _check_mask(attention_mask, right=False)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": others.get("use_cache"),
            "logits_to_keep": 1,
        }

    def _dropout_keys(self, tokens: Tensor) -> Tensor | None:
        """Keys [B] of the masks of this pass, from torch's generator; None outside of training."""
        if self.decoder.dropout is None or not self.training:
            return None
        return torch.randint(torch.iinfo(torch.int64).max, (len(tokens),), device=tokens.device)

    def get_input_embeddings(self) -> torch.nn.Module:
        raise NotImplementedError(
            "Headway's embedding is a parameter, `model.decoder.embedding`, and no module: it cannot be resized or "
            "replaced; train a model with the vocabulary that you want, and export it"
        )


def _check_mask(mask: Tensor | None, *, right: bool) -> None:
    """Raise ValueError unless the mask [B, S] has no padding, or with `right` padding on the right only."""
    if mask is None or bool(mask.all()):
        return
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask: of shape {list(mask.shape)}; use [B, S] with 1 for tokens and 0 for padding, or leave it "
            "out"
        )
    if not right:
        raise ValueError(
            "attention_mask: padding is not supported in generation, nor with a cache, which holds sequences of equal "
            "length; generate from prompts of equal length, or one at a time"
        )
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError(
            "attention_mask: has padding before or between tokens, which would be seen as text; pad on the right "
            "(tokenizer.padding_side = 'right'), or pass one sequence at a time"
        )


def _next_tokens(labels: Tensor) -> Tensor:
    """The target [B, S] of each position: the label of the next one; none for the last."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)


assert HeadwayForCausalLM.__name__ == ARCHITECTURE, "config.json of a folder names the class"
AutoConfig.register(MODEL_TYPE, HeadwayConfig, exist_ok=True)
AutoModelForCausalLM.register(HeadwayConfig, HeadwayForCausalLM, exist_ok=True)
