"""farm db: the schema, by hand."""

from __future__ import annotations

import typer

app = typer.Typer(help="Look after the database.", no_args_is_help=True)


@app.command()
def upgrade() -> None:
    """Bring an older database to this farm's schema."""
    from db.migrate import upgrade as run
    from farm.settings import load_settings

    print(run(load_settings()))


@app.callback()
def _group() -> None:
    """Keep `upgrade` a word of its own while it is alone."""
