"""Values of event files that are no scalars: images, texts, the custom layout, and hyperparameters.

Each function returns a `Summary.Value`, whose class is made at import, so type checkers do not know it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from headway.launcher.board.layout import Charts, Margin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HParam = bool | int | float | str
_S3 = "boto3"


@contextlib.contextmanager
def without_s3() -> Iterator[None]:
    """Import modules of TensorBoard without the client of Amazon S3, which takes 0.3 s for each rank.

    Where boto3 is installed (streaming needs it), TensorBoard would import it, and does without it if that fails. Event
    files are written to a folder, never to S3.
    """
    modules = cast("dict[str, Any]", sys.modules)
    if hidden := _S3 not in modules:
        modules[_S3] = None  # makes `import boto3` raise ImportError
    try:
        yield
    finally:
        if hidden:
            del modules[_S3]


def image_value(tag: str, image: NDArray[np.uint8], dataformats: str) -> Any:
    """An image, as `SummaryWriter.add_image` writes it."""
    with without_s3():
        from torch.utils.tensorboard import summary
    return summary.image(tag, image, dataformats=dataformats).value[0]


def text_value(tag: str, markdown: str) -> Any:
    """A text in Markdown."""
    from tensorboard.plugins.text import plugin_data_pb2

    made = cast("Any", plugin_data_pb2).TextPluginData(version=0).SerializeToString()
    return _tensor(f"{tag}/text_summary", markdown.encode(), "text", made, shape=(1,))


def _margin(made: Any, of: Margin) -> Any:
    series = made.MarginChartContent.Series(value=of.value, lower=of.low, upper=of.high)
    return made.MarginChartContent(series=[series])


def layout_value(categories: Mapping[str, Charts]) -> Any:
    """The layout of the tab Custom Scalars. The latest one of a run counts."""
    with without_s3():
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    made = cast("Any", layout_pb2)
    layout = made.Layout(
        category=[
            made.Category(
                title=title,
                chart=[
                    made.Chart(title=name, margin=_margin(made, tags))
                    if isinstance(tags, Margin)
                    else made.Chart(title=name, multiline=made.MultilineChartContent(tag=tags))
                    for name, tags in charts.items()
                ],
            )
            for title, charts in categories.items()
        ]
    )
    return _tensor(metadata.CONFIG_SUMMARY_TAG, layout.SerializeToString(), metadata.PLUGIN_NAME, b"")


def start_value(hparams: Mapping[str, HParam], group: str, wall_s: float) -> Any:
    """The hyperparameters of a run. `group`: name of the run in the tab HParams. `wall_s`: time of its start."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    made = cast("Any", plugin_data_pb2)
    info = made.SessionStartInfo(group_name=group, start_time_secs=wall_s)
    for name, value in hparams.items():
        kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
        setattr(info.hparams[name], f"{kind}_value", value)
    return _session("SESSION_START_INFO_TAG", session_start_info=info)


def end_value(wall_s: float) -> Any:
    """The end of a complete run. `wall_s`: its time."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    status = cast("Any", api_pb2).STATUS_SUCCESS
    info = cast("Any", plugin_data_pb2).SessionEndInfo(status=status, end_time_secs=wall_s)
    return _session("SESSION_END_INFO_TAG", session_end_info=info)


def experiment_value(kinds: Mapping[str, str], metrics: Mapping[str, str]) -> Any:
    """The columns of the tab HParams, for all runs of a folder. Without one, it shows every value and every scalar.

    `kinds`: name of a hyperparameter -> `bool`, `float64` or `string`. `metrics`: tag of a scalar -> its title.
    """
    from tensorboard.plugins.hparams import api_pb2

    made = cast("Any", api_pb2)
    experiment = made.Experiment(
        hparam_infos=[
            made.HParamInfo(name=name, type=made.DataType.Value(f"DATA_TYPE_{kind.upper()}"))
            for name, kind in kinds.items()
        ],
        metric_infos=[
            made.MetricInfo(name=made.MetricName(tag=tag), display_name=title) for tag, title in metrics.items()
        ],
    )
    return _session("EXPERIMENT_TAG", experiment=experiment)


def _session(tag: str, **content: Any) -> Any:
    with without_s3():
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data = cast("Any", plugin_data_pb2).HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    return _tensor(getattr(metadata, tag), None, metadata.PLUGIN_NAME, data.SerializeToString())


def _tensor(tag: str, content: bytes | None, plugin: str, data: bytes, *, shape: tuple[int, ...] = ()) -> Any:
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

    proto, shapes = cast("Any", summary_pb2), cast("Any", tensor_shape_pb2).TensorShapeProto
    value = proto.Summary.Value(
        tag=tag,
        metadata=proto.SummaryMetadata(plugin_data=proto.SummaryMetadata.PluginData(plugin_name=plugin, content=data)),
    )
    if content is not None:
        value.tensor.CopyFrom(
            cast("Any", tensor_pb2).TensorProto(
                dtype=cast("Any", types_pb2).DT_STRING,
                string_val=[content],
                tensor_shape=shapes(dim=[shapes.Dim(size=size) for size in shape]),
            )
        )
    return value
