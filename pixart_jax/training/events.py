"""TensorBoard's event file, written at once and by the caller's own thread.

tensorboardX's SummaryWriter hands events to a thread of its own, where a full disk ends in a
traceback that nobody can catch. Its records, protocol buffers and summaries are used here without
that thread: a write that fails is the caller's OSError.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np


class Events:
    """A new event file in ``folder``. purge_step: TensorBoard forgets what earlier files of the
    folder hold from this step on."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        from tensorboardX.record_writer import RecordWriter

        now = time.time()
        self._records = RecordWriter(
            str(
                Path(folder) / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
            )
        )
        self._write(wall_time=now, file_version="brain.Event:2")
        if purge_step is not None:
            from tensorboardX.proto.event_pb2 import SessionLog

            self._write(
                wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START)
            )

    def scalar(self, name: str, value: float, step: int) -> None:
        """One figure of a step."""
        from tensorboardX import summary

        self._write(wall_time=time.time(), step=step, summary=summary.scalar(name, value))

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: uint8 [h, w, 3]."""
        from tensorboardX import summary

        self._write(
            wall_time=time.time(),
            step=step,
            summary=summary.image(name, picture, dataformats="HWC"),
        )

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._records._writer.flush()  # RecordWriter.flush waits for the disk itself, every time

    def close(self) -> None:
        """Raises OSError where the last of it finds no room; the file is closed all the same."""
        self._records.close()

    def _write(self, **fields) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._records.write(Event(**fields).SerializeToString())
