"""A checkpoint holds what each rank holds, and every other layout continues it, in real processes over gloo."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headway.model.decoder import Decoder
from headway.parallel import checkpoint
from headway.parallel.config import CheckpointError

HERE = Path(__file__).parent


def _cases():
    sys.path.insert(0, str(HERE))
    try:
        spec = importlib.util.spec_from_file_location("span_cases", HERE / "span_cases.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(HERE))
    return module


cases = _cases()
SAVED = [(precision, name) for precision, names in cases.SAVERS.items() for name in names]
MOVED = [
    (precision, name, target)
    for precision, moves in cases.MOVES.items()
    for name, targets in moves.items()
    for target in targets
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple[str, ...], dict]:
    found = {}
    for processes in (2, 4, 1):
        command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes), str(HERE / "span_cases.py"), str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        for line in done.stdout.splitlines():
            if line.startswith("CASE "):
                case = json.loads(line.removeprefix("CASE "))
                key = (case["precision"], case["name"], *([case["target"]] if "target" in case else []))
                found[key] = case
    return found


@pytest.mark.parametrize(("precision", "name"), SAVED)
def test_a_save_exchanges_no_tensors(results, precision, name):
    traffic = results[precision, name]["traffic"]
    exchanged = {name: size for name, size in traffic["ours"].items() if size}
    # What is left: the barrier, and JSON about files and errors. Each rank gets that of all ranks, padded.
    assert exchanged.keys() <= {"allgather_", "barrier"}
    assert 0 < sum(exchanged.values()) < 40_000
    # What counts them does count: the sums that a save had before, of four bytes for each element of the state.
    assert sum(traffic["theirs"].values()) > 0.9 * traffic["state"] / cases.LAYOUTS[name][0]


@pytest.mark.parametrize(("precision", "name"), [s for s in SAVED if "dp" in s[1]])
def test_each_data_rank_writes_its_own_part(results, folder, precision, name):
    assert (precision, name) in results
    files = checkpoint.read_manifest(folder / precision / name / "step-0000000002").files
    sizes = [entry.bytes for entry in files.values()]
    assert len(sizes) == cases.LAYOUTS[name][0] and all(entry.spans for entry in files.values())
    if "pp" not in name:  # stages differ in size
        assert max(sizes) < 1.25 * min(sizes)


@pytest.mark.parametrize(("precision", "name", "target"), MOVED)
def test_another_layout_loads_the_same_state_and_continues_as_from_whole_tensors(results, precision, name, target):
    saved, moved = results[precision, name], results[precision, name, target]["ways"]
    assert len(saved["digests"]) > 40
    assert moved["now"]["digests"] == moved["-format-2"]["digests"] == saved["digests"]
    # Losses and norms, to the last bit.
    assert moved["now"]["figures"] == moved["-format-2"]["figures"]
    if target == name:
        assert moved["now"]["figures"] == saved["figures"]


@pytest.mark.parametrize("name", ["dp2-z3", "tp2", "pp2", "tp2·dp2", "tp2·dp2-z3"])
def test_a_single_process_reads_the_weights_of_all_files(results, folder, name):
    """As exports, generation and validation do."""
    decoder = Decoder(cases.MODEL, cases.ATTENTION, vocab_size=cases.VOCAB, seed=9)
    checkpoint.load_weights(checkpoint.newest_readable(folder / "fp32" / name, warn=pytest.fail, run=None), decoder)
    held = {f"param/{key}": tensor for key, tensor in decoder.named_parameters()}
    held |= {f"buffer/{key}": tensor for key, tensor in checkpoint.persistent_buffers(decoder)}
    found = {key: cases._hash(tensor) for key, tensor in held.items()}
    saved = results["fp32", name]["digests"]
    assert found == {key: value for key, value in saved.items() if not key.startswith("exp_avg")}
    assert any(key.startswith("buffer/") for key in found)


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_a_damaged_part_is_named(results, folder, tmp_path, damage):
    assert results
    root = tmp_path / "checkpoints"
    shutil.copytree(folder / "fp32" / "tp2·dp2-z3", root)
    part = root / "step-0000000002" / "tensors-00002-of-00004.safetensors"
    body = bytearray(part.read_bytes())
    if damage == "missing":
        part.unlink()
    elif damage == "altered":
        body[-3] ^= 4
        part.write_bytes(body)
    else:
        part.write_bytes(body[:-1])
    said: list[str] = []
    with pytest.raises(CheckpointError, match="none of 1"):
        checkpoint.newest_readable(root, warn=said.append, run=None)
    assert str(part) in said[0]
