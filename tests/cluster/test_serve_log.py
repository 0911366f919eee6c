import logging

import pytest

from cluster.serve_log import log_with_serve


@pytest.fixture
def serve_lines():
    """Lines that Serve's logger gets; it and ours are as before afterwards."""
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    loggers = [logging.getLogger(name) for name in ("ray.serve", "cluster", "router_service", "experts")]
    before = [(each.level, each.handlers, each.propagate) for each in loggers]
    loggers[0].handlers, loggers[0].propagate = [Handler()], False
    loggers[0].setLevel(logging.INFO)
    yield lines
    for each, (level, handlers, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


def test_lines_of_our_packages_go_to_serves_logger(serve_lines):
    log_with_serve()
    log_with_serve()
    logging.getLogger("cluster.group_host").info("loaded %d of %d MB", 1, 2)
    logging.getLogger("router_service.replica_choice").warning("lost")
    logging.getLogger("experts.group").debug("nobody reads this")
    assert serve_lines == [("INFO", "loaded 1 of 2 MB"), ("WARNING", "lost")]
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging.getLogger("cluster.group_host").info("as serve's own")
    assert len(serve_lines) == 2
