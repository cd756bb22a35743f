"""A checkpoint holds what each rank holds, and every other layout continues it, in real processes over gloo."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
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


def size(layout: str) -> int:
    """Processes of a layout."""
    return cases.LAYOUTS[layout][0]


def case(*key: str):
    """A case that needs 4 processes is slow, and so are some of those that need 2."""
    fast = max(map(size, key[1:])) <= 2 and (len(key) == 2 or cases.is_fast(*key))
    return pytest.param(*key, marks=[] if fast else [pytest.mark.slow])


SAVED = [case(precision, name) for precision, names in cases.SAVERS.items() for name in names]
CUT_BY_DATA = [case(precision, name) for precision, names in cases.SAVERS.items() for name in names if "dp" in name]
MOVED = [
    case(precision, name, target)
    for precision, moves in cases.MOVES.items()
    for name, targets in moves.items()
    for target in targets
]


class Results(dict[tuple[str, ...], dict]):
    """What workers printed, by (precision, saver) and (precision, saver, layout that continues).

    Workers are started on demand.
    """

    def __init__(self, folder: Path, run_ranks: Callable[..., str]) -> None:
        super().__init__()
        self.folder, self._run_ranks = folder, run_ranks
        self._started: set[tuple[int, int, str]] = set()

    def __missing__(self, key: tuple[str, ...]) -> dict:
        savers = size(key[1])
        starts = [(savers, savers, "saved")]
        if len(key) == 3:
            starts.append((size(key[2]), savers, "fast" if cases.is_fast(*key) else "more"))
        for start in starts:
            if start not in self._started:
                self._started.add(start)
                self._start(*start)
        return dict(self)[key]

    def _start(self, processes: int, savers: int, which: str) -> None:
        for line in self._run_ranks(processes, HERE / "span_cases.py", self.folder, savers, which).splitlines():
            if line.startswith("CASE "):
                found = json.loads(line.removeprefix("CASE "))
                self[found["precision"], found["name"], *([found["target"]] if "target" in found else [])] = found


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> Results:
    return Results(tmp_path_factory.mktemp("layouts"), run_ranks)


def checkpoints(results: Results, precision: str, name: str) -> Path:
    assert results[precision, name]
    return results.folder / precision / name


@pytest.mark.parametrize(("precision", "name"), SAVED)
def test_a_save_exchanges_no_tensors(results, precision, name):
    traffic = results[precision, name]["traffic"]
    exchanged = {operation: count for operation, count in traffic["ours"].items() if count}
    # What is left: the barrier, and JSON about files and errors. Each rank gets that of all ranks, padded.
    assert exchanged.keys() <= {"allgather_", "barrier"}
    assert 0 < sum(exchanged.values()) < 40_000
    # What counts them does count: the sums that a save had before, of four bytes for each element of the state.
    assert sum(traffic["theirs"].values()) > 0.9 * traffic["state"] / size(name)


@pytest.mark.parametrize(("precision", "name"), CUT_BY_DATA)
def test_each_data_rank_writes_its_own_part(results, precision, name):
    files = checkpoint.read_manifest(checkpoints(results, precision, name) / "step-0000000002").files
    sizes = [entry.bytes for entry in files.values()]
    assert len(sizes) == size(name) and all(entry.spans for entry in files.values())
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


@pytest.mark.parametrize(("precision", "name"), [s for s in SAVED if s.values[0] == "fp32"])
def test_a_single_process_reads_the_weights_of_all_files(results, precision, name):
    """As exports, generation and validation do."""
    decoder = Decoder(cases.MODEL, cases.ATTENTION, vocab_size=cases.VOCAB, seed=9)
    root = checkpoints(results, precision, name)
    checkpoint.load_weights(checkpoint.newest_readable(root, warn=pytest.fail, run=None), decoder)
    held = {f"param/{key}": tensor for key, tensor in decoder.named_parameters()}
    held |= {f"buffer/{key}": tensor for key, tensor in checkpoint.persistent_buffers(decoder)}
    found = {key: cases._hash(tensor) for key, tensor in held.items()}
    saved = results[precision, name]["digests"]
    assert found == {key: value for key, value in saved.items() if not key.startswith("exp_avg")}
    assert any(key.startswith("buffer/") for key in found)


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_a_damaged_part_is_named(results, tmp_path, damage):
    root = tmp_path / "checkpoints"
    shutil.copytree(checkpoints(results, "fp32", "dp2-z3"), root)
    part = root / "step-0000000002" / "tensors-00001-of-00002.safetensors"
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
