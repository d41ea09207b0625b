"""Alembic's entry: runs the migrations on the connection that the ledger hands over.

The ledger has already begun a transaction under its lock, so a migration is applied as a whole or not at all,
on both databases (SQLite's DDL is transactional once the driver does not commit behind our back).
"""

from __future__ import annotations

from alembic import context

from ds01spawner.ledger.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
