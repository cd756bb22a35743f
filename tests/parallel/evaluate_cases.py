"""Run by test_evaluate.py in 2 processes: evaluates a tiny decoder on ranks with different numbers of targets.

Prints one JSON object per case on rank 0. Not a test module itself.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from headway.parallel.layout import init_layout

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("engine_cases", HERE / "engine_cases.py")
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of which half of the rows are what the untrained decoder guesses; no target in some rows."""
    tokens = cases.global_batch(0).tokens
    with torch.no_grad():
        labels = cases.decoder().eval().logits(tokens).argmax(-1)
    labels[::2] = (labels[::2] + 1) % cases.VOCAB
    labels[5:, 7:] = -100
    labels[6] = -100
    return tokens, labels


def main() -> None:
    layout = init_layout(device="cpu", timeout_s=60)
    torch.set_num_threads(1)
    tokens, labels = labelled()
    kept = labels != -100
    expected = {"hits": int(kept[1::2].sum()), "targets": int(kept.sum())}
    for zero in (1, 3):
        engine = cases.engine(zero, "fp32", layout, 2)
        per_rank = cases.GLOBAL // layout.dp_size
        rows = range(layout.dp_rank * per_rank, (layout.dp_rank + 1) * per_rank, 2)
        micro = [cases.Micro(tokens[i : i + 2], labels[i : i + 2], None) for i in rows]
        mine = sum(int((m.labels != -100).sum()) for m in micro)
        result = engine.evaluate(micro)
        # Each row is a document; the parts are all of them, and the last three.
        documents = [torch.arange(i, i + 2)[:, None].expand_as(m.labels) for i, m in zip(rows, micro, strict=True)]
        of_rows = engine.evaluate_parts(micro, documents, [range(cases.GLOBAL), range(cases.GLOBAL - 3, cases.GLOBAL)])
        if layout.is_main:
            found = {"accuracy": result.accuracy, "targets": result.targets, "loss": result.loss}
            found |= {"standard_error": result.standard_error, "groups": result.groups}
            found["of_rows"] = [[e.loss, e.standard_error, e.groups] for e in of_rows]
            print("CASE", json.dumps({"zero": zero, "mine": mine, "expected": expected, **found}), flush=True)
        dist.barrier()
    if layout.is_main:
        out = cases.decoder()(tokens, labels)
        pairs = [cases.decoder()(tokens[i : i + 2], labels[i : i + 2]) for i in range(0, len(tokens), 2)]
        each = [[float(pair.loss_sum), int(pair.targets)] for pair in pairs]
        singles = [cases.decoder()(tokens[i : i + 1], labels[i : i + 1]) for i in range(len(tokens))]
        by_row = [[float(single.loss_sum), int(single.targets)] for single in singles]
        plain = {"loss": float(out.loss_sum) / int(out.targets), "each": each, "rows": by_row}
        print("PLAIN", json.dumps(plain), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
