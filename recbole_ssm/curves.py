"""TensorBoard, without what RecBole's way with it leaves behind."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Silence:
    """A TensorBoard that nothing is written to."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Curves:
    """A TensorBoard that ends, with a line in the log, where its file can no longer be written.

    Args:
        writer: RecBole's; the file that it began is removed, and begun anew where something is written.
    """

    def __init__(self, writer: SummaryWriter):
        self._writer: Any = writer
        begun: dict[str, Any] = writer.all_writers or {}
        files = [Path(one.event_writer._file_name) for one in begun.values()]
        writer.close()
        for file in files:
            file.unlink(missing_ok=True)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args, **kwargs):
            try:
                return getattr(self._writer, name)(*args, **kwargs)
            except OSError as error:
                self._writer = Silence()
                logging.getLogger().warning(f"log_tensorboard cannot be written ({error}): its curves end here.")

        return call


@contextmanager
def disk_errors_told_once() -> Iterator[None]:
    """Keep TensorBoard's thread from printing a traceback of an error that :class:`Curves` tells of."""
    hook = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, OSError) or type(args.thread).__module__.partition(".")[0] != "tensorboard":
            hook(args)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = hook
