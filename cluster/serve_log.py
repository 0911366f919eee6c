"""Our packages' log lines in the files of Ray Serve."""

from __future__ import annotations

import logging

_SERVE = "ray.serve"
_PACKAGES = "cluster", "router_service", "experts"


def log_with_serve() -> None:
    """From now on lines of this replica's process go where Serve writes the replica's own, in its format.

    Serve configures its own logger alone: ours would lose what is below a warning, and the time of everything else.
    """
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.handlers = [_ToServe()]
        logger.propagate = False


class _ToServe(logging.Handler):
    """Hands records to Serve's logger, whatever handlers that has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        serve = logging.getLogger(_SERVE)
        if serve.isEnabledFor(record.levelno):
            serve.handle(record)
