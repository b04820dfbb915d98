"""Bringing an older database to this farm's schema, with Alembic."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from db.engine import connect
from db.tables import SCHEMA_REVISION
from farm.errors import StorageError
from farm.settings import Settings


def upgrade(settings: Settings) -> str:
    """Run the missing migrations; the answer says what the schema is now."""
    database = connect(settings)
    database.refuse_newer()
    try:
        with database.write() as conn:
            database.hold_schema(conn)
            command.upgrade(alembic_config(conn), "head")
    except CommandError as exc:
        raise StorageError(f"{database} cannot be brought to schema {SCHEMA_REVISION}: {exc}") from exc
    database.close()
    return f"{database} has schema {SCHEMA_REVISION}"


def alembic_config(connection: object) -> Config:
    """Alembic's configuration over an open connection, whose transaction it joins."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config
