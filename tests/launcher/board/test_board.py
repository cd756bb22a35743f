"""What TensorBoard shows of records, read back from event files."""

import io
import random
import re
import zlib
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from headway.launcher.board.event_file import EventFile, crc32c
from headway.launcher.board.events import Drawing
from headway.launcher.board.layout import layout_of
from headway.launcher.board.picture import ABSENT, CELL_PX, EVEN, LEFT_PX, NONE, TOP_PX, TWICE, load_picture
from headway.launcher.board.scalars import HEAD_MEASURES
from headway.launcher.board.writer import Writer
from headway.launcher.run.run_dir import RunDir, write_json

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
SPEC = {
    "name": "tiny",
    "seed": 3,
    "attention": {"type": "rgqa", "windows": None},
    "model": {"biases": False},
    "optimizer": {"lr": 0.1},
    "data": {"paths": ["a", "b"]},
    "launch": {"env": {"SOME": None}},
}
CARD = {"cost": {"num_params": 1234}, "started_at": "2030-01-01T00:00:00Z"}
HEADS = {"member": "query head", "members": 4, "c_w": 0.1, "c_q": 0.2, "c_o": 0.3, "effective_rank": 3.5, "cka": 0.4}


@pytest.fixture
def events(tmp_path):
    """Call with records, which are drawn; returns the data read from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def draw(*records, per_layer=False, spec=None, summary=None):
        run = RunDir(tmp_path)
        if spec is not None:
            write_json(run.spec, spec)
            write_json(run.card, CARD)
        board = Writer(str(run.tensorboard), purge_step=0)
        drawing = Drawing(board, run, per_layer=per_layer)
        drawing.begin()
        for record in records:
            drawing.draw(record)
        if summary is not None:
            drawing.end(summary)
        board.close()
        found = EventAccumulator(str(run.tensorboard))
        found.Reload()
        return found

    return draw


def trained(step=7, **more):
    values = {"loss": 2.0, "aux_loss": 0.0, "grad_norm": 1.0, "lr": 0.1, "step_s": 0.1, "data_s": 0.0}
    return {"kind": "train", "step": step, "tokens": 8 * step, "tokens_per_s": 80.0, **values, **more}


def routed(step=7):
    return trained(step, router={"layer_00": {"router": FIGURES}, "layer_01": {"router": FIGURES}})


def last(found):
    return {tag: found.Scalars(tag)[-1] for tag in found.Tags()["scalars"]}


def test_router_scalars_are_means_over_groups_and_layers(events):
    other = {**FIGURES, "dead": [1, 0], "gate": [0.5, 0.5], "load": [[0.7, 0.3, 0.0, 0.0], [0.25] * 4]}
    record = trained(router={"layer_00": {"router": FIGURES}, "layer_01": {"router": other}})
    values = last(events(record, per_layer=True))
    assert all(event.step == 7 for event in values.values())
    for key, wanted in {
        "layer_00/router_dead": 2,
        "layer_00/router_peak": 0.5,
        "layer_00/router_effective_experts": 3,
        "layer_00/router_switch_rate": 0.6,
        "layer_00/router_close_share": 0.25,
        "layer_00/router_mutual_information_share": 0.3,  # of the known group
        "all/router_dead": 3,
        "all/router_peak": 0.7,
        "all/router_gate": 0.75,
    }.items():
        assert values[f"router/{key}"].value == pytest.approx(wanted), key
    assert len([tag for tag in values if tag.startswith("router/")]) == 3 * 10


def test_scalars_of_layers_are_behind_one_switch(events):
    heads = {"kind": "heads", "step": 7, "layers": {"layer_00": HEADS, "layer_01": {**HEADS, "c_o": 0.5}}}
    values = last(events(routed(), heads))
    assert not any("layer_" in tag for tag in values)
    assert values["heads/mean/c_o"].value == pytest.approx(0.4)
    assert {tag.split("/")[-1] for tag in values if tag.startswith("heads/")} == {*HEAD_MEASURES}


def test_a_profiled_step_has_a_loss_and_no_speed(events):
    found = events(trained(1), trained(2, profiled=True), trained(3))
    assert [e.step for e in found.Scalars("train/loss")] == [1, 2, 3]
    assert [e.step for e in found.Scalars("perf/tokens_per_s")] == [1, 3]


def test_loads_are_one_image_of_layers_by_experts_with_axes(events):
    from PIL import Image

    found = events(routed())
    assert found.Tags()["images"] == ["router/load_router"]
    (event,) = found.Images("router/load_router")
    assert event.step == 7 and event.width >= LEFT_PX + 8 * CELL_PX and event.height > TOP_PX + 2 * CELL_PX
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    inside = picture[TOP_PX : TOP_PX + 2 * CELL_PX, LEFT_PX : LEFT_PX + 8 * CELL_PX]
    cells = inside[CELL_PX // 2 :: CELL_PX, CELL_PX // 2 :: CELL_PX]
    assert [tuple(map(int, cell)) for cell in cells[1]] == [TWICE] * 2 + [NONE] * 2 + [EVEN] * 4
    dark = (picture < 100).all(-1)
    assert dark[TOP_PX : TOP_PX + 2 * CELL_PX, : LEFT_PX - 2].any()  # numbers of layers
    assert dark[TOP_PX + 2 * CELL_PX + 7 :, LEFT_PX:].any() and dark[: TOP_PX - 2].any()  # those of experts; the title


def test_rows_of_a_picture_have_the_numbers_of_their_layers():
    one, ten = (load_picture({name: [[1.0, 1.0]]}) for name in ("layer_01", "layer_10"))
    assert one.shape == ten.shape and (one[:, :LEFT_PX] != ten[:, :LEFT_PX]).any()
    assert (one[:, LEFT_PX:] == ten[:, LEFT_PX:]).all()


def test_layers_with_fewer_experts_are_padded_with_grey():
    picture = load_picture({"layer_00": [[1.0, 1.0]], "layer_01": [[1.0]]})
    right = LEFT_PX + 2 * CELL_PX - 1
    assert tuple(picture[TOP_PX, right]) == EVEN and tuple(picture[TOP_PX + 2 * CELL_PX - 1, right]) == ABSENT


def test_numbers_of_many_experts_do_not_run_into_each_other():
    picture = load_picture({"layer_00": [[1.0] * 128] * 2})
    below = (picture[TOP_PX + CELL_PX + 8 : TOP_PX + CELL_PX + 18, LEFT_PX:] < 128).all(-1).any(0)
    gaps = np.diff(np.flatnonzero(below))
    assert (gaps > 4).sum() == 127  # wider than between digits: 0, 2, ..., 254


def text(found, tag: str) -> str:
    (event,) = found.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_spec_and_report_are_texts(events):
    summary = {"complete": True, "steps": 9, "tokens": 72, "final_validation_loss": 1.5, "train_s": 61.0}
    found = events(trained(), spec=SPEC, summary=summary | {"tokens_per_s_median": 80.0, "resumes": 2})
    spec, report = text(found, "run/spec"), text(found, "run/report")
    assert (
        "attention.type    = rgqa" in spec and "data.paths        = [a, b]" in spec and "| parameters | 1,234 |" in spec
    )
    assert "launch.env" not in spec
    for line in ("| validation loss, nats per token | 1.5000 |", "| tokens | 72 in 9 steps |", "| resumes | 2 |"):
        assert line in report


def test_hyperparameters_come_with_the_result(events):
    from tensorboard.plugins.hparams import metadata

    summary = {"complete": True, "steps": 9, "final_validation_loss": 1.5, "train_s": 61.0}
    found = events(trained(), spec=SPEC, summary=summary)
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    assert start.start_time_secs == 1893456000 and start.group_name == "tiny"
    assert {key: getattr(v, v.WhichOneof("kind")) for key, v in start.hparams.items()} == {
        "attention.type": "rgqa",
        "optimizer.lr": 0.1,
        "model.biases": False,
        "seed": 3.0,
    }
    end = found.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(end).end_time_secs == 1893456061


def layouts(found) -> list[list[str]]:
    """Titles of the categories of each layout, in the order in which they were written."""
    layout_class: Any = import_module("tensorboard.plugins.custom_scalar.layout_pb2").Layout
    points = found.Tensors("custom_scalars__config__")
    read = [layout_class.FromString(point.tensor_proto.string_val[0]) for point in points]
    return [[category.title for category in layout.category] for layout in read]


def test_loss_and_speed_come_first_and_what_there_is_not_does_not_come(events):
    validation = {"kind": "validation", "step": 8, "loss": 2.0, "accuracy": 0.5}
    found = events(trained(), validation, routed(9), routed(10))
    assert layouts(found) == [
        ["Loss", "Speed", "Optimizer"],
        ["Loss", "Speed", "Optimizer"],  # with a chart of validation
        ["Loss", "Speed", "Optimizer", "Routers, over all layers"],
    ]


def test_every_scalar_over_layers_is_in_a_chart(events):
    heads = {"kind": "heads", "step": 7, "layers": {"layer_00": HEADS}}
    sets = {"kind": "validation", "step": 7, "loss": 2.0, "accuracy": 0.5, "sets": {"code": {"loss": 1.0}}}
    sets["bits_per_byte"] = sets["sets"]["code"]["bits_per_byte"] = 0.5
    for one in (sets, sets["sets"]["code"]):
        one |= {"loss_low": one["loss"] - 0.1, "loss_high": one["loss"] + 0.1}
    skipped = {"kind": "skipped", "step": 7, "total": 1}
    tags = last(events(routed(), heads, sets, skipped))
    patterns = [pattern for charts in layout_of(tags).values() for chart in charts.values() for pattern in chart]
    left = {tag for tag in tags if not any(re.match(pattern, tag) for pattern in patterns)}
    assert left == {"train/perplexity", "val/perplexity", "train/tokens"}  # they say what others say


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
