"""TensorBoard's writer of event files, imported without the client of Amazon S3."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard.writer import SummaryWriter

_S3 = "boto3"


def writer_class() -> type[SummaryWriter]:
    """`SummaryWriter`. Where boto3 is installed (streaming needs it), TensorBoard would import it: 0.3 s for each rank.

    Event files are written to a folder, never to S3. TensorBoard does without boto3 if its import fails.
    """
    with _without_s3():
        from torch.utils.tensorboard.writer import SummaryWriter
    return SummaryWriter


def image_value(tag: str, image: NDArray[np.uint8], dataformats: str) -> Any:
    """The `Summary.Value` of an image, as `SummaryWriter.add_image` writes it."""
    with _without_s3():
        from torch.utils.tensorboard import summary
    return summary.image(tag, image, dataformats=dataformats).value[0]


@contextlib.contextmanager
def _without_s3() -> Iterator[None]:
    modules = cast("dict[str, Any]", sys.modules)
    if hidden := _S3 not in modules:
        modules[_S3] = None  # makes `import boto3` raise ImportError
    try:
        yield
    finally:
        if hidden:
            del modules[_S3]
