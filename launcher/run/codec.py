"""Convert between text and token ids with the tokenizer that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headway.data import tokenizer as tokenizers
from headway.data.config import DataError, PairsSource, SyntheticSource, datasets_of
from headway.launcher.base.errors import SpecError
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.spec.spec import Spec

if TYPE_CHECKING:
    from headway.data.tokenizer import CorpusTokenizer
    from headway.model.huggingface.folder import ExportedConfig


class Codec:
    """Convert between text and token ids. For synthetic data or without a tokenizer, the text is a list of ids.

    `tokenizer`: the loaded tokenizer, or None; `file`: its tokenizer.json; `eos_id` and `eos_token` end a document;
    `bos_id` begins every prompt. `start_ids` start a target of the pairs that an encoder-decoder was trained on; None
    for other data.
    """

    def __init__(
        self,
        tokenizer: CorpusTokenizer | None,
        vocab_size: int,
        *,
        file: Path | None = None,
        eos_id: int | None = None,
        eos_token: str | None = None,
        bos_id: int | None = None,
        start_ids: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer, self._vocab_size = tokenizer, vocab_size
        self.file, self.eos_id, self.eos_token, self.bos_id = file, eos_id, eos_token, bos_id
        self.start_ids = None if start_ids is None else tuple(start_ids)

    @classmethod
    def of(cls, spec: Spec, run: RunDir) -> Codec:
        """The codec of a run. Raises DataError if its dataset is missing or differs."""
        source = spec.data.source
        assert spec.model.vocab_size is not None
        if isinstance(source, SyntheticSource):
            return cls(None, source.vocab_size)
        from headway.data import tokenizer
        from headway.data.manifest import TOKENIZER_NAME, read_manifest
        from headway.data.mixture import mixed_fingerprint
        from headway.data.split_pairs import start_ids

        roots = [Path(part.path).expanduser() for part in datasets_of(source)]
        manifests = [read_manifest(root) for root in roots]
        root, manifest = roots[0], manifests[0]  # all have one tokenizer
        found = mixed_fingerprint([m.fingerprint for m in manifests]) if len(roots) > 1 else manifest.fingerprint
        trained_on = read_mapping(run.card).get("data_fingerprint")
        if trained_on is not None and found != trained_on:
            raise DataError(
                f"{root}: not the dataset this run was trained on (fingerprint {found[:16]}, the run "
                f"{trained_on[:16]}): its token ids may mean other text; restore that dataset, or build it anew"
            )
        file = root / TOKENIZER_NAME
        if tokenizer.sha256_of(file) != manifest.tokenizer_sha256:
            raise DataError(f"{file}: not the tokenizer of the dataset; restore it, or build the dataset anew")
        started = start_ids(manifest) if isinstance(source, PairsSource) else None
        size = spec.model.vocab_size
        return cls._of_file(file, size, eos_id=manifest.eos_id, bos_id=None, start_ids=started)

    @classmethod
    def of_exported(cls, folder: Path, config: ExportedConfig) -> Codec:
        """The codec of a weights folder whose files have been verified."""
        from headway.model.huggingface.folder import TOKENIZER

        file = folder / TOKENIZER if TOKENIZER in config.files else None
        ends = {"eos_id": config.eos_token_id, "bos_id": config.bos_token_id}
        return cls.of_weights(file, config.vocab_size, **ends, start_ids=config.target_start_ids)

    @classmethod
    def of_weights(
        cls,
        file: Path | None,
        vocab_size: int,
        *,
        eos_id: int | None,
        bos_id: int | None,
        start_ids: Sequence[int] | None = None,
    ) -> Codec:
        """The codec of weights with the tokenizer.json `file`. Without it, or without an end token, texts are ids."""
        if file is None or eos_id is None:
            return cls(None, vocab_size, eos_id=eos_id, bos_id=bos_id, start_ids=start_ids)
        return cls._of_file(file, vocab_size, eos_id=eos_id, bos_id=bos_id, start_ids=start_ids)

    @classmethod
    def _of_file(
        cls, file: Path, vocab_size: int, *, eos_id: int, bos_id: int | None, start_ids: Sequence[int] | None
    ) -> Codec:
        from headway.data import tokenizer

        eos_token = token_of(file, eos_id)
        loaded = tokenizer.load(file, eos_token=eos_token)
        ends = {"eos_id": eos_id, "eos_token": eos_token, "bos_id": bos_id}
        return cls(loaded, vocab_size, file=file, **ends, start_ids=start_ids)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at least one. An empty text prompt begins a document."""
        begin = [] if self.bos_id is None else [self.bos_id]
        if self.tokenizer is not None:
            return [*begin, *self.tokenizer.encode([prompt])[0]] or [self.tokenizer.eos_id]
        words = prompt.split()
        if not words or not all(w.isdecimal() and w.isascii() and int(w) < self._vocab_size for w in words):
            raise SpecError(
                f"prompt: this model knows token ids (synthetic ones, or it has no tokenizer), not text; give numbers "
                f"from 0 to {self._vocab_size - 1} separated by spaces, such as '5 40 7 33 5'"
            )
        return begin + [int(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    def text_bytes(self, ids: list[int]) -> int:
        """Bytes of the text of these ids, without a space that the tokenizer puts before a text (`add_prefix_space`).

        One byte too few for a text that begins with a space itself: with and without it, the ids are the same.
        """
        text = self.decode(ids)
        if text.startswith(" ") and self.tokenizer is not None and [*self.tokenizer.encode([text[1:]])[0]] == ids:
            text = text[1:]
        return len(text.encode("utf-8", errors="surrogatepass"))

    def loses(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the ids of a text do not give it back. A space that the tokenizer puts before it is no loss."""
        assert self.tokenizer is not None, "the model knows text"
        return any(back != f" {text}" for _, back in self.tokenizer.lost([text], [ids]))


def token_of(file: Path, token_id: int) -> str:
    """The text of a token of a tokenizer.json. Raises DataError if the token or the file does not exist."""
    token = tokenizers.open_file(file).id_to_token(token_id)
    if token is None:
        raise DataError(f"{file}: has no token {token_id}, which ends documents; give the tokenizer of the model")
    return token
