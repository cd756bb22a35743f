"""Write an event file of TensorBoard from many points that are all at hand, as fast as they can be read.

`SummaryWriter` takes about 40 us for each scalar: it makes one event of it, hands that to a thread, and computes its
checksum byte by byte in Python. Here all values of a record are one event, and the checksums of many events are
computed together. A reader finds the same points.
"""

from __future__ import annotations

from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from headway.launcher.board.summaries import image_value

_MOST_BYTES = 4 << 20  # of events whose checksums are computed together, each as long as the longest one


class EventFile:
    """The points of one event file. `file`: empty and open for writing; the caller closes it. `wall_s`: wall-clock time
    of its beginning in seconds.

    `add_scalar`, `add_image` and `add_value` have the arguments of `headway.launcher.board.writer.Writer`; step and
    time must be given. The scalars and images of one record are added, then `end_record` writes them. `close` must be
    called at the end. All raise OSError.
    """

    def __init__(self, file: BinaryIO, wall_s: float) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        # Their classes are made when they are imported, so type checkers do not know them.
        events, summaries = cast("Any", event_pb2), cast("Any", summary_pb2)
        self._file, self._event, self._summary = file, events.Event, summaries.Summary
        self._value = summaries.Summary.Value
        self._texts, self._longest = list[bytes](), 0
        self._values, self._step, self._wall_s = list[Any](), 0, 0.0
        start = events.SessionLog(status=events.SessionLog.START)
        self._write(self._event(wall_time=wall_s, file_version="brain.Event:2"))
        self._write(self._event(wall_time=wall_s, session_log=start))

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, walltime: Any = None) -> None:
        """Raises TypeError or ValueError for a value that is not a number."""
        self._add(self._value(tag=tag, simple_value=float(scalar_value)), global_step, walltime)

    def add_image(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "CHW"
    ) -> None:
        self._add(image_value(tag, img_tensor, dataformats), global_step, walltime)

    def add_value(self, value: Any, global_step: Any = None, walltime: Any = None) -> None:
        """Write an event of its own, which belongs to no record."""
        self._write(self._event(wall_time=walltime, step=global_step, summary=self._summary(value=[value])))

    def end_record(self) -> None:
        """Write the values that were added since the last call as one event."""
        if self._values:
            self._write(self._event(wall_time=self._wall_s, step=self._step, summary=self._summary(value=self._values)))
        self.drop_record()

    def drop_record(self) -> None:
        """Forget the values that were added since the last call of `end_record`."""
        self._values = []

    def close(self) -> None:
        """Write what waits."""
        texts = self._texts
        lengths = np.array([len(text) for text in texts], dtype="<u8")
        heads = [length.tobytes() for length in lengths]
        checks = zip(_masked(crc32c(heads)), _masked(crc32c(texts)), strict=True)
        for head, text, (check, text_check) in zip(heads, texts, checks, strict=True):
            self._file.write(b"".join((head, check, text, text_check)))
        self._texts, self._longest = [], 0

    def _add(self, value: Any, step: Any, wall_s: Any) -> None:
        self._step, self._wall_s = step, wall_s
        self._values.append(value)

    def _write(self, event: Any) -> None:
        text = event.SerializeToString()
        longest = max(self._longest, len(text))
        if longest * (len(self._texts) + 1) > _MOST_BYTES:
            self.close()
            longest = len(text)
        self._texts.append(text)
        self._longest = longest


def crc32c(texts: list[bytes]) -> NDArray[np.uint32]:
    """CRC-32C (Castagnoli) of each text, computed for all of them byte by byte (RFC 3720, appendix B.4)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    longest = len(texts[order[0]]) if texts else 0
    table = np.frombuffer(b"".join(texts[i].ljust(longest, b"\0") for i in order), dtype=np.uint8)
    columns = np.ascontiguousarray(table.reshape(len(texts), longest).T)
    left = np.searchsorted([-len(texts[i]) for i in order], -np.arange(longest))  # texts with a byte in each column
    crc = np.full(len(texts), 0xFFFFFFFF, dtype=np.uint32)
    for column, count in zip(columns, left.tolist(), strict=True):
        some = crc[:count]
        crc[:count] = _TABLE[(some ^ column[:count]) & 0xFF] ^ (some >> 8)
    found = np.empty_like(crc)
    found[order] = ~crc
    return found


def _table() -> NDArray[np.uint32]:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1)
    return crc


_TABLE = _table()


def _masked(crc: NDArray[np.uint32]) -> list[bytes]:
    """Checksums as records of TensorFlow contain them: rotated by 15 bits, plus a constant."""
    rotated = (crc >> np.uint32(15)) | (crc << np.uint32(17))
    return [value.tobytes() for value in (rotated + np.uint32(0xA282EAD8)).astype("<u4")]
