"""Resolve the specs of a study layer by layer: base file, arguments, variant, solved size, seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headway.data.config import SyntheticSource
from headway.launcher.base import console
from headway.launcher.match.matching import spec_cost
from headway.launcher.run.run_dir import flatten
from headway.launcher.spec.fields import root_shape
from headway.launcher.spec.load import DEFAULT, load_spec
from headway.launcher.spec.merge import format_value, override_layer
from headway.launcher.spec.yamlio import Node
from headway.launcher.study.config import Study
from headway.launcher.study.uptrain.keys import Uptraining
from headway.launcher.study.uptrain.origins import spec_keys

if TYPE_CHECKING:
    from headway.data.config import DataConfig
    from headway.launcher.spec.spec import Spec
    from headway.model.cost import Cost

START = "model.branch_start"

Facts = dict[str, tuple[int, str | None]]
"""Source and sequence length -> (vocabulary size, fingerprint) of data that was verified."""

NO_AUTO = "would give each variant a micro-batch of its own, and the variants of a study must cut their batches alike"


class Resolver:
    """Resolve specs layer by layer: base file, arguments, variant, solved size, seed."""

    def __init__(self, study: Study, arguments: Sequence[str], facts: Facts | None = None) -> None:
        """`facts`: filled with what is read of the data. Given to several resolvers, the data is verified once."""
        from headway.launcher.spec.spec import Spec

        self.study, self.arguments = study, list(arguments)
        self.layer = override_layer(self.arguments, root_shape(Spec))
        self.starts: dict[str, dict[str, Any]] = {}
        self.facts: Facts = {} if facts is None else facts
        self.uptraining = Uptraining(self)

    def load(self, variant: str, *more: tuple[dict[str, Any], str]) -> tuple[Spec, list[str]]:
        """(spec, notes) of a variant. `more`: further layers, lowest first, as (keys, origin)."""
        layers = [*self._layers(variant), *more]
        if start := self.start(variant):
            layers.insert(0, (start, "branch_start of the study"))
        loaded = load_spec(self.study.base, extra=layers, no_auto=NO_AUTO)
        return loaded.spec, loaded.notes

    def start(self, variant: str) -> dict[str, Any]:
        """Keys that `branch_start` of the study sets; none if a file or argument sets them or weights are given, and by
        default none of an encoder-decoder, whose branches are not measured.
        """
        if variant not in self.starts:
            written = load_spec(self.study.base, extra=self._layers(variant), no_auto=NO_AUTO)
            given = str(written.origins[START]) != str(DEFAULT) or written.spec.init.weights is not None
            default = "branch_start" not in self.study.config.model_fields_set
            given = given or (written.spec.model.is_encoder_decoder and default)
            self.starts[variant] = {} if given else {START: self.study.config.branch_start}
        return self.starts[variant]

    def _layers(self, variant: str) -> list[tuple[dict[str, Any] | Node, str]]:
        """The arguments and the keys of the variant, above the base file."""
        own = (self.study.variants[variant], f"variant {variant}")
        if given := self.uptraining.keys(variant):
            return [(self.layer, "arguments"), (given, f"`from` or `compute` of variant {variant}"), own]
        return [(self.layer, "arguments"), own]

    def keys(self, variant: str) -> dict[str, Any]:
        """The keys that a variant sets: written ones, and those of `from` and `compute`."""
        return {**self.uptraining.keys(variant), **spec_keys(self.study.config.variants[variant])}

    def base(self) -> Spec:
        """The base spec with the arguments."""
        return load_spec(self.study.base, extra=[(self.layer, "arguments")], no_auto=NO_AUTO).spec

    def overrides(self, spec: Spec, cell_keys: dict[str, Any]) -> tuple[str, ...]:
        """Arguments that give the same spec from the base file alone, where they form one layer and none is dropped."""
        present = flatten(spec.model_dump(mode="json"))
        arguments = []
        for argument in self.arguments:
            key = argument.partition("=")[0]
            exists = key in present or any(known.startswith(f"{key}.") for known in present)
            if key not in cell_keys and exists:  # else the mechanism of the variant lacks the key or sets it
                arguments.append(argument)
        return (*arguments, *(f"{key}={format_value(value)}" for key, value in cell_keys.items()))

    def data_facts(self, data: DataConfig) -> tuple[int, str | None]:
        """(vocabulary size, fingerprint) of a source; the fingerprint is None for synthetic data."""
        source = data.source
        if isinstance(source, SyntheticSource):
            return source.vocab_size, None
        key = f"{source.model_dump_json()}\0{data.seq_len}"
        if key not in self.facts:
            from headway.data.verify import verify_source

            info, _ = verify_source(source, seq_len=data.seq_len, progress=console.progress)
            self.facts[key] = (info.vocab_size, info.fingerprint)
        return self.facts[key]

    def cost(self, spec: Spec) -> Cost:
        return spec_cost(spec, self.vocab_size(spec))

    def sized(self, spec: Spec) -> Spec:
        """The spec with the vocabulary size of the data."""
        model = spec.model.model_copy(update={"vocab_size": self.vocab_size(spec)})
        return spec.model_copy(update={"model": model})

    def vocab_size(self, spec: Spec) -> int:
        return spec.model.vocab_size or self.data_facts(spec.data)[0]
