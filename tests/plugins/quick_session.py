"""What every test would else pay for: vectors in compiled loops, and a log level that is set anew.

Nothing that a test shows depends on either.
"""

from __future__ import annotations

import os

import pytest

# Read when Inductor is imported. To find which vectors there are it tries the compiler seven times
# in a new folder, and their headers are most of what the compiler reads for a loop.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Give the level of the log to what keeps it for reports, once.

    pytest would set the root logger's too, six times a test, and each time forget for all loggers
    which levels they have. The root logger has that level already.
    """
    kept = session.config.pluginmanager.get_plugin("logging-plugin")
    if kept is not None and kept.log_level is not None:
        for handler in (kept.caplog_handler, kept.report_handler):
            handler.setLevel(kept.log_level)
        kept.log_level = None
