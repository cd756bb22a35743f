"""Python API for runs and studies. `docs/python.md` shows each function with a result.

A run:

    run = load_run("runs/tiny")
    losses = [row["loss"] for row in run.metrics()]
    text = run.model().generate("def ", tokens=50)

A study:

    study = load_study("studies/quickstart")
    rows = study.comparison()
    best = min(rows, key=lambda row: row["loss"])

Tables are lists of dicts with the same keys in each row, suitable for `csv.DictWriter`; `frame` gives the same as a
pandas frame. No function writes into a folder, and only `Run.model` imports torch. Errors are HeadwayError and its
subclasses, with advice in the message.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.run.run_dir import RunDir, read_mapping

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from headway.launcher.compare.analyse import StudyResult
    from headway.launcher.compare.simultaneous import Simultaneous
    from headway.launcher.compare.stats import Estimate
    from headway.launcher.run.codec import Codec
    from headway.model.decoder import Decoder

Row = dict[str, Any]
METRICS = ("train", "validation", "heads", "checkpoint")
"""Kinds of records that most runs have. `Run.metrics` accepts any kind in metrics.jsonl."""


def load_run(path: str | os.PathLike[str]) -> Run:
    """Open the run in a folder. Raises NoInputError if the folder does not contain a run."""
    folder = _folder(path, "a run")
    if (folder / "study.json").is_file():
        raise NoInputError(
            f"{folder}: is the folder of a study; use load_study, or name one of its runs, "
            f"{folder}/cells/VARIANT/seed-N"
        )
    if not (folder / "spec.json").is_file():
        raise NoInputError(
            f"{folder}: holds no spec.json, so it is no run; `headway train` says where its run folder is"
        )
    return Run(folder)


def load_study(path: str | os.PathLike[str]) -> Study:
    """Open the study in a folder. Raises NoInputError if the folder does not contain a study."""
    folder = _folder(path, "a study")
    if (folder / "spec.json").is_file():
        raise NoInputError(f"{folder}: is the folder of one run; use load_run, or name the folder with study.json")
    if (folder / "ladder.json").is_file():
        raise NoInputError(
            f"{folder}: is the folder of a study with sizes; open the one of a size, {folder}/sizes/SIZE"
        )
    if not (folder / "study.json").is_file():
        raise NoInputError(
            f"{folder}: holds no study.json, so it is no study; `headway study run` writes one into its `out` folder"
        )
    return Study(folder)


class Run:
    """One run folder. Files are read on access, because training may still be running."""

    def __init__(self, path: Path) -> None:
        self.path, self._run = path, RunDir(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def spec(self) -> Row:
        """The resolved spec, nested as in YAML. Raises SpecError if the file is damaged."""
        found = read_mapping(self._run.spec)
        if not found:
            raise SpecError(f"{self._run.spec}: is no whole JSON object; restore it, or train the run anew")
        return found

    @property
    def card(self) -> Row:
        """Run metadata: versions, machine, data fingerprint, cost per token; empty if it was never written."""
        return read_mapping(self._run.card)

    @property
    def summary(self) -> Row:
        """Totals, written at the end of training; empty before. `complete` is true if the run reached its end."""
        return read_mapping(self._run.summary)

    @property
    def damage(self) -> str | None:
        """How the records of a finished run differ from its summary; None if they agree, or before its end."""
        from headway.launcher.run.record_check import check_records

        return check_records(self.path).damage

    def metrics(self, kind: str = "train") -> list[Row]:
        """Records of one kind, in the order of steps. If a step was trained again, the later record is used.

        Raises SpecError for a kind that has no records in the run. Warns if the run is damaged, see `damage`.
        """
        if (damage := self.damage) is not None:
            warnings.warn(f"{self.path}: {damage}; restore the folder from a copy", stacklevel=2)
        found: dict[Any, Row] = {}
        kinds: set[str] = set()
        records = self._run.read_metrics() if self._run.metrics.exists() else iter(())
        for number, record in enumerate(records):
            kinds.add(str(record.get("kind")))
            if record.get("kind") == kind:
                step = record.get("step")
                found[step if isinstance(step, int) else (number,)] = record
        if not found and kind not in METRICS:
            there = ", ".join(sorted(kinds)) or "none"
            raise SpecError(f"{self._run.metrics}: has no records of kind {kind!r}; use one of: {there}")
        rows = sorted(found.items(), key=lambda item: item[0] if isinstance(item[0], int) else -1)
        return _same_keys([row for _, row in rows])

    def frame(self, kind: str = "train") -> pandas.DataFrame:
        """`metrics` as a pandas frame, one row per record. Raises SpecError as `metrics` does, and without pandas."""
        return _frame(self.metrics(kind))

    def checkpoints(self) -> list[Row]:
        """Checkpoints, newest first: step, tokens, validation loss, bytes, layout, age, `error` (None if intact)."""
        from headway.launcher.run.checkpoints import checkpoint_rows

        return _same_keys(checkpoint_rows(self.path))

    def model(self, step: int | None = None) -> Model:
        """The decoder in evaluation mode, with the weights of the newest complete checkpoint or of that at `step`.

        Uses the GPU if there is one and the spec does not select the CPU. Raises CheckpointError or NoInputError if the
        checkpoint does not exist, DataError if the dataset with the tokenizer is missing or different, and SpecError if
        the mechanism belongs to a package that is not installed.
        """
        from headway.launcher.exchange.opened import load_model
        from headway.launcher.run.codec import Codec
        from headway.launcher.run.stored_spec import stored_spec

        spec = stored_spec(self._run)
        codec = Codec.of(spec, self._run)
        decoder, found = load_model(self._run, spec, step)
        assert spec.model.vocab_size is not None, "a run folder holds a resolved spec"
        return Model(decoder=decoder, codec=codec, step=found, vocab_size=spec.model.vocab_size)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder and its tokenizer. Models of synthetic data have none: their text is ids separated by spaces."""

    decoder: Decoder
    codec: Codec
    step: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids, at least one."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.codec.decode(list(ids))

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """ids [S] -> [S, V], or [B, S] -> [B, S, V], on the device of the decoder. Without gradients."""
        import torch

        try:
            tokens = torch.as_tensor(ids)
        except (TypeError, ValueError) as error:
            raise SpecError(
                f"ids: cannot be read as token ids ({error}); give equal-length lists of integers"
            ) from None
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.dim() not in (1, 2) or not tokens.numel():
            raise SpecError(
                f"ids: {tokens.dtype} of shape {list(tokens.shape)}; give integers [S] or [B, S], such as encode(text)"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise SpecError(
                f"ids: from {int(tokens.min())} to {int(tokens.max())}; this model has token ids from 0 to "
                f"{self.vocab_size - 1}; give ids that `encode` of this model made"
            )
        batch = tokens.long().to(next(self.decoder.parameters()).device)
        with torch.no_grad():
            found = self.decoder.logits(batch if batch.dim() == 2 else batch[None])
        return found if batch.dim() == 2 else found[0]

    __call__ = logits

    def generate(
        self, prompt: str, *, tokens: int = 100, temperature: float = 0.0, top_p: float = 1.0, seed: int = 1
    ) -> str:
        """The prompt and its continuation, as `headway generate` prints them. Temperature 0: greedy decoding."""
        from headway.launcher.exchange.generate import Sampling, continuation

        sampling = Sampling(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)
        sampling.check()
        ids = self.encode(prompt)
        return self.decode([*ids, *continuation(self.decoder, ids, sampling, eos_id=self.codec.eos_id, stats={})])


class Study:
    """One study folder. Each access computes the results from the runs again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Study({str(self.path)!r})"

    def result(self) -> StudyResult:
        """All numbers of the report. Raises SpecError if study.json is damaged."""
        from headway.launcher.compare.analyse import analyse

        return analyse(self.path)

    @property
    def variants(self) -> list[str]:
        """Names of the variants, in the order of the study file."""
        return [variant.name for variant in self.result().variants]

    @property
    def baseline(self) -> str:
        """Name of the variant that all others are compared with."""
        return self.result().record["baseline"]

    def cells(self) -> list[Row]:
        """One row per variant and seed. `loss`: validation loss at the compared token count; None unless it is done.

        `state` damaged: the records are not what the run wrote, and are in no number of `comparison`. `beside`: most
        other cells that trained at the same time, whose load is in `tokens_per_s`; compare speeds only where it is 0.
        """
        result = self.result()
        return [
            {
                "variant": cell.variant,
                "seed": cell.seed,
                "state": cell.state,
                "detail": cell.detail,
                "tokens": cell.record.tokens,
                "loss": cell.loss,
                "tokens_per_s": cell.speed.tokens_per_s if cell.speed is not None else None,
                "beside": cell.beside,
                "path": str(cell.record.path),
            }
            for cell in result.cells
        ]

    def comparison(self) -> list[Row]:
        """One row per variant: its loss (nats per token) and its difference to the baseline, with 95 % intervals.

        `difference` is None for the baseline and without finished runs; intervals are None with one seed. `pairing`
        PAIRED: all variants saw the same batches, and differences are taken within each seed.
        """
        result = self.result()
        rows = []
        for variant in result.variants:
            row: Row = {
                "variant": variant.name,
                "baseline": variant.name == result.record["baseline"],
                "seeds": len(variant.losses),
                "tokens": result.tokens,
                "pairing": result.pairing.status,
                "verdict": None if variant is result.baseline else result.verdict(variant),
                "start_confounded": variant.start.confounded,
                "num_params": variant.cost["num_params"],
                "flops_per_token": variant.cost["flops_per_token_useful"],
                "kv_bytes_per_token": variant.cost["kv_bytes_per_token"],
            }
            rows.append(
                row
                | _interval("loss", variant.loss)
                | _interval("difference", variant.difference, p_value=True)
                | _interval("speed_ratio", variant.speed_ratio)
            )
        return rows

    def frame(self) -> pandas.DataFrame:
        """`cells` as a pandas frame, one row per variant and seed. Raises SpecError without pandas."""
        return _frame(self.cells())

    @property
    def runs(self) -> dict[tuple[str, int], Run]:
        """(variant, seed) -> run, for all runs that were started."""
        cells = [(cell.variant, cell.seed, cell.record.path) for cell in self.result().cells]
        return {(variant, seed): Run(path) for variant, seed, path in cells if (path / "spec.json").is_file()}


def _interval(name: str, found: Estimate | Simultaneous | None, *, p_value: bool = False) -> Row:
    row: Row = {name: None, f"{name}_low": None, f"{name}_high": None} | ({f"{name}_p_value": None} if p_value else {})
    if found is not None:
        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        row |= {f"{name}_p_value": found.p_value} if p_value else {}
    return row


def _frame(rows: list[Row]) -> pandas.DataFrame:
    try:
        import pandas
    except ImportError:
        raise SpecError("pandas is not installed; `pip install pandas`, or use the rows without a frame") from None
    return pandas.DataFrame(rows)


def _same_keys(rows: list[Row]) -> list[Row]:
    """Extend all rows to the union of their keys. Missing values are None."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def _folder(path: str | os.PathLike[str], what: str) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NoInputError(f"{folder}: is a file; name the folder of {what}")
    raise NoInputError(f"{folder}: no such folder; name the folder of {what}, relative to {Path.cwd()} or absolute")
