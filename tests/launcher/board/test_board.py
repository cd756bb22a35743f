"""TensorBoard data of routers and heads, read back from event files."""

import io
import random
import zlib

import numpy as np
import pytest

from headway.launcher.board.event_file import EventFile, crc32c
from headway.launcher.board.events import ABSENT, CELL_PX, EVEN, NONE, TWICE, board_heads, board_routers, load_map

FIGURES = {
    "load": [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]],
    "effective": [2.0, 4.0],
    "dead": [2, 0],
    "tokens": 80,
    "entropy": [1.0, 1.2],
    "gate": [0.9, 1.1],
    "top1_margin": [0.2, 0.4],
    "close": [0.0, 0.5],
    "switch_rate": [0.5, 0.7],
    "mutual_information": [0.1, 0.2],
    "information_bias": [0.0, 0.0],
    "information_share": [0.3, None],
}
HEADS = {"member": "query head", "members": 4, "c_w": 0.1, "c_q": 0.2, "c_o": 0.3, "effective_rank": 3.5, "cka": 0.4}


@pytest.fixture
def events(tmp_path):
    """Call with a function that writes; returns the data read from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard.writer import SummaryWriter

    def write(function, record):
        with SummaryWriter(str(tmp_path)) as board:
            function(board, record, 7)
        found = EventAccumulator(str(tmp_path))
        found.Reload()
        return found

    return write


def test_router_scalars_are_means_over_groups(events):
    found = events(board_routers, {"layer_00": {"router": FIGURES}, "layer_01": {"router": FIGURES}})
    values = {tag: found.Scalars(tag)[-1] for tag in found.Tags()["scalars"]}
    assert all(event.step == 7 for event in values.values())
    for key, wanted in {
        "dead": 2,
        "peak": 0.5,
        "effective_experts": 3,
        "switch_rate": 0.6,
        "close_share": 0.25,
    }.items():
        assert values[f"router/layer_01/router_{key}"].value == pytest.approx(wanted)
    assert values["router/layer_00/router_mutual_information_share"].value == pytest.approx(0.3)  # of the known group


def test_loads_are_one_image_of_layers_by_experts(events):
    from PIL import Image

    found = events(board_routers, {"layer_00": {"router": FIGURES}, "layer_01": {"router": FIGURES}})
    assert found.Tags()["images"] == ["router/load_router"]
    (event,) = found.Images("router/load_router")
    assert (event.step, event.width, event.height) == (7, 8 * CELL_PX, 2 * CELL_PX)
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    cells = picture[CELL_PX // 2 :: CELL_PX, CELL_PX // 2 :: CELL_PX]
    assert [tuple(map(int, cell)) for cell in cells[1]] == [TWICE] * 2 + [NONE] * 2 + [EVEN] * 4


def test_layers_with_fewer_experts_are_padded_with_grey():
    picture = load_map([[1.0, 1.0], [1.0]])
    assert tuple(picture[0, -1]) == EVEN and tuple(picture[-1, -1]) == ABSENT


def test_heads_are_shown_by_layer_and_over_layers(events):
    found = events(board_heads, {"layer_00": HEADS, "layer_01": {**HEADS, "c_o": 0.5}})
    assert found.Scalars("heads/layer_01/c_o")[0].value == pytest.approx(0.5)
    assert found.Scalars("heads/mean/c_o")[0].value == pytest.approx(0.4)
    assert {tag.split("/")[-1] for tag in found.Tags()["scalars"]} == {"c_w", "c_q", "c_o", "effective_rank", "cka"}


def test_checksums_of_many_texts_are_those_of_tensorboard():
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as one

    draw = random.Random(0)
    texts = [draw.randbytes(draw.choice([0, 1, 7, draw.randrange(300)])) for _ in range(200)]
    assert crc32c(texts).tolist() == [one(text) for text in texts]
    assert crc32c([]).size == crc32c([b""])[0] == 0
    assert crc32c([b"123456789"])[0] == 0xE3069283 != zlib.crc32(b"123456789")


def test_values_of_a_record_are_one_event_with_the_points_of_the_writer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard.writer import SummaryWriter

    values = [0.1, 3, 1e300, float("nan"), float("-inf"), np.float32(2.5)]
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()
    with (tmp_path / "many" / "events.out.tfevents.0").open("wb") as file, SummaryWriter(str(tmp_path / "one")) as one:
        many = EventFile(file, 100.0)
        for step in range(3):
            for board in (many, one):
                for i, value in enumerate(values):
                    board.add_scalar(f"tag/{i}", value, step, 100.0 + step)
            many.end_record()
        many.add_scalar("dropped", 1.0, 3, 103.0)
        many.drop_record()
        for wrong in (None, "text", [1, 2]):
            with pytest.raises((TypeError, ValueError)):
                many.add_scalar("wrong", wrong, 3, 103.0)
        many.end_record()
        many.close()
    found = [EventAccumulator(str(tmp_path / name)) for name in ("many", "one")]
    for one_side in found:
        one_side.Reload()
    mine, theirs = ({tag: repr(f.Scalars(tag)) for tag in f.Tags()["scalars"]} for f in found)
    assert mine == theirs and len(mine) == len(values)


def test_waiting_events_are_written_in_order_when_they_become_large(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("headway.launcher.board.event_file._MOST_BYTES", 500)
    with (tmp_path / "events.out.tfevents.0").open("wb") as file:
        board = EventFile(file, 100.0)
        for step in range(100):
            board.add_scalar("x" * (step + 1 if step % 10 else 600), step, step, float(step))
            board.end_record()
        assert file.tell() > 5000
        board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [e.step for e in found.Scalars("x" * 600)] == list(range(0, 100, 10))
    assert sum(len(found.Scalars(tag)) for tag in found.Tags()["scalars"]) == 100
