"""TensorBoard's writer of event files, imported without the client of Amazon S3."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

_S3 = "boto3"


def writer_class() -> type[SummaryWriter]:
    """`SummaryWriter`. Where boto3 is installed (streaming needs it), TensorBoard would import it: 0.3 s for each rank.

    Event files are written to a folder, never to S3. TensorBoard does without boto3 if its import fails.
    """
    modules = cast("dict[str, Any]", sys.modules)
    if hidden := _S3 not in modules:
        modules[_S3] = None  # makes `import boto3` raise ImportError
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    finally:
        if hidden:
            del modules[_S3]
    return SummaryWriter
