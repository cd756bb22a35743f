"""The example package of docs/examples, installed by pip into an environment, trains by the real command."""

import json

TYPE = "attention={type: temperature_gqa, heads: 4, kv_heads: 2, head_dim: 8}"
SHORT = ("train.tokens=1024", "train.validation_tokens=256", "train.validate_every_tokens=512")


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] in ("train", "validation")]


def write_spec(headway):
    """The tiny spec of all tests with the example's mechanism in place of its own."""
    lines = headway.spec.read_text().splitlines()
    lines = [TYPE.replace("attention=", "attention: ") if line.startswith("attention:") else line for line in lines]
    headway.spec.write_text("\n".join(lines) + "\n")


def test_it_trains_alike_on_one_rank_and_on_two_tensor_parallel_ones(headway_with_example, headway):
    write_spec(headway_with_example)
    one = headway_with_example.train(*SHORT, "run_dir=one")
    assert one.returncode == 0, one.stderr
    two = headway_with_example.train(*SHORT, "run_dir=two", "launch.processes=2", "parallel.tensor=2")
    assert two.returncode == 0, two.stderr
    folder = headway_with_example.folder
    alone, shared = losses(folder / "one"), losses(folder / "two")
    assert len(alone) == len(shared) >= 6
    # fp32, and the sums of two ranks are added in another order
    assert max(abs(a - b) / a for a, b in zip(alone, shared, strict=True)) < 1e-5
    cards = [json.loads((folder / name / "run.json").read_text())["mechanism"] for name in ("one", "two")]
    assert cards[0] == cards[1] and cards[0]["package"] == "headway-example-mechanism 0.1.0"
    said = headway.run("generate", str(folder / "one"), "1 2 3", "--tokens", "4")
    assert said.returncode == 64 and "'temperature_gqa' is not a known type" in said.stderr
