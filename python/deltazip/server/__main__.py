"""python -m deltazip.server"""

import typer

from deltazip.server.run import serve
from deltazip.server.settings import command_for


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command_for(serve))
    app(prog_name="python -m deltazip.server")


if __name__ == "__main__":
    main()
