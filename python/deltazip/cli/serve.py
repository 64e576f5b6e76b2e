"""deltazip serve: the same as python -m deltazip.server."""

from deltazip.server.run import serve
from deltazip.server.settings import command_for

__all__ = ["command"]

command = command_for(serve)
