"""RecBole's log of a run: begun, and ended with the next one."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from colorama.ansitowin32 import StreamWrapper
from recbole.utils import init_logger, init_seed

from recbole_ssm.config import Config
from recbole_ssm.places import CHECKPOINTS_REMEDY, LOGS_REMEDY, check_folder, writing

_LOGS: list[logging.Handler] = []  # of the run that was started last


def start_logging(config: Config) -> logging.Logger:
    """Seed the random generators, start RecBole's log, and log the configuration.

    Raises:
        CannotWrite: where RecBole's logs cannot be written.
    """
    init_seed(config["seed"], config["reproducibility"])
    for folder in (f"log/{config['model']}", "log_tensorboard"):
        check_folder(folder, LOGS_REMEDY)
    with writing(config["checkpoint_dir"], CHECKPOINTS_REMEDY):
        Path(config["checkpoint_dir"]).mkdir(parents=True, exist_ok=True)  # RecBole's way fails where another is first
    logger = logging.getLogger()
    _end_logs(logger)
    others = logger.handlers[:]
    init_logger(config)
    _LOGS.extend(handler for handler in logger.handlers if handler not in others)
    for handler in _LOGS:
        _end_quietly(handler)
    logger.info(sys.argv)
    logger.info(config)
    logger.info("Property files: " + ", ".join(f"{file.parent.name}/{file.name}" for file in config.property_files))
    if any(file.parent.name == "tuned" for file in config.property_files):
        logger.info("The last of these is what tuning found for this model on this set: --tuned=False leaves it out.")
    for doubt in config.doubts:
        logger.warning(doubt)
    return logger


def _end_logs(logger: logging.Logger) -> None:
    """Undo what RecBole's ``init_logger`` did for the run before: as it is, the next run's file would stay empty."""
    while _LOGS:
        handler = _LOGS.pop()
        logger.removeHandler(handler)
        with suppress(OSError):  # of a disk that is full, where it told so already
            handler.close()
    while isinstance(sys.stdout, StreamWrapper):  # anew each time, until Python's stack is too small
        sys.stdout = sys.stdout._StreamWrapper__wrapped
    while isinstance(sys.stderr, StreamWrapper):
        sys.stderr = sys.stderr._StreamWrapper__wrapped


def _end_quietly(handler: logging.Handler) -> None:
    """Let a handler of a log that can no longer be written say so once, instead of a traceback for each line."""
    tell_of_others = handler.handleError

    def tell(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            tell_of_others(record)
            return
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):
            name = getattr(handler, "baseFilename", "the console")
            print(f"{name} cannot be written ({error.strerror}): this log ends here.", file=sys.stderr)

    handler.handleError = tell  # type: ignore[method-assign]
