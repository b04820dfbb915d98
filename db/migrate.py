"""Bringing an older database to this farm's schema, with Alembic."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

from db.engine import Database
from db.tables import SCHEMA_REVISION
from farm.settings import Settings, make_home


def upgrade(settings: Settings) -> str:
    """Run the missing migrations; the answer says what the schema is now."""
    make_home(settings)
    database = Database(settings.database_url or f"sqlite:///{settings.home / 'farm.db'}")
    with database.write() as conn:
        command.upgrade(alembic_config(conn), "head")
    database.close()
    return f"{database} has schema {SCHEMA_REVISION}"


def alembic_config(connection: object) -> Config:
    """Alembic's configuration over an open connection, whose transaction it joins."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config
