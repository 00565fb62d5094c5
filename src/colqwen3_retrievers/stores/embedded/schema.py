"""The embedded store's tables, and how an older format becomes this one.

Version 1 had no codes, counted no dead rows and kept no checksum of what it says about a page; version 2 knew codes of
int8 only. Opening either for writing makes it version 3 in one transaction; pages of version 1 get codes little by
little, with what is written from then on. Opened for reading it stays as it is, and is read through views that say so.
"""

from __future__ import annotations

import sqlite3
from typing import Final

APPLICATION_ID: Final = 0x43513352  # "CQ3R", in the header of the file
FORMAT_VERSION: Final = 3
READABLE_VERSIONS: Final = (1, 2, 3)

SCHEMA: Final = """
-- one row: what made the multi-vectors, a counter of commits, and one of rearrangements (both only grow);
-- code_factor is the number of tokens for each row of a page's code, code_bits of a component of it
CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 1), info TEXT NOT NULL, token_type TEXT NOT NULL,
    generation INTEGER NOT NULL, layout INTEGER NOT NULL, code_factor INTEGER NOT NULL DEFAULT 1,
    code_bits INTEGER NOT NULL DEFAULT 8);
-- token files and the code files beside them; rows are the committed ones, the files may be longer; dead are those
-- token rows that no page has any more
CREATE TABLE segments (segment INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL,
    dead INTEGER NOT NULL DEFAULT 0, codes TEXT NOT NULL DEFAULT '', code_rows INTEGER NOT NULL DEFAULT 0);
-- one row a page, kept narrow for it is read whole for the first search. Keys are never used again, and pages
-- ordered by key lie in the files in that order: (segment, start) grows with key. code_rows is 0 for a page that has no
-- code yet
CREATE TABLE pages (key INTEGER PRIMARY KEY AUTOINCREMENT, segment INTEGER NOT NULL REFERENCES segments,
    start INTEGER NOT NULL, rows INTEGER NOT NULL, crc32 INTEGER NOT NULL, id TEXT NOT NULL UNIQUE,
    source TEXT NOT NULL, number INTEGER NOT NULL, label TEXT, sha256 TEXT NOT NULL, image TEXT,
    code_start INTEGER NOT NULL DEFAULT 0, code_rows INTEGER NOT NULL DEFAULT 0, code_scale REAL NOT NULL DEFAULT 0,
    code_crc32 INTEGER NOT NULL DEFAULT 0);
CREATE INDEX pages_source ON pages (source, number);
CREATE INDEX pages_sha256 ON pages (sha256);
CREATE INDEX pages_image ON pages (image) WHERE image IS NOT NULL;
CREATE INDEX pages_uncoded ON pages (key) WHERE code_rows = 0;
-- what is read only for the pages asked for; shape is JSON: slices, grid and token strings; clusters are int32; crc32
-- is that of all that is said about the page, NULL in pages of version 1
CREATE TABLE contents (key INTEGER PRIMARY KEY REFERENCES pages ON DELETE CASCADE, metadata TEXT NOT NULL,
    text TEXT NOT NULL, shape TEXT NOT NULL, clusters BLOB, crc32 INTEGER);
-- metadata laid flat for filters, see where_sql
CREATE TABLE facts (key INTEGER NOT NULL REFERENCES pages ON DELETE CASCADE, name TEXT NOT NULL, kind TEXT NOT NULL,
    value, place INTEGER NOT NULL, PRIMARY KEY (key, name, place)) WITHOUT ROWID;
CREATE INDEX facts_value ON facts (name, kind, value);
-- pages that were there once: what open readers must forget
CREATE TABLE tombstones (key INTEGER PRIMARY KEY, generation INTEGER NOT NULL, segment INTEGER NOT NULL,
    start INTEGER NOT NULL, rows INTEGER NOT NULL);
CREATE INDEX tombstones_generation ON tombstones (generation);
"""

_FROM_VERSION_1: Final = (
    "ALTER TABLE state ADD COLUMN code_factor INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE segments ADD COLUMN dead INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE segments ADD COLUMN codes TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE segments ADD COLUMN code_rows INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE pages ADD COLUMN code_start INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE pages ADD COLUMN code_rows INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE pages ADD COLUMN code_scale REAL NOT NULL DEFAULT 0",
    "ALTER TABLE pages ADD COLUMN code_crc32 INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE contents ADD COLUMN crc32 INTEGER",
    "CREATE INDEX pages_uncoded ON pages (key) WHERE code_rows = 0",
    "UPDATE segments SET codes = replace(replace(name, 'tokens-', 'codes-'), '.f16', '.i8'), "
    "dead = (SELECT coalesce(sum(t.rows), 0) FROM tombstones AS t WHERE t.segment = segments.segment)",
)

_FROM_VERSION_2: Final = ("ALTER TABLE state ADD COLUMN code_bits INTEGER NOT NULL DEFAULT 8",)

_VIEWS_OF_VERSION_2: Final = (
    "CREATE TEMP VIEW state AS SELECT only, info, token_type, generation, layout, code_factor, 8 AS code_bits "
    "FROM main.state",
)

_VIEWS_OF_VERSION_1: Final = (
    "CREATE TEMP VIEW state AS SELECT only, info, token_type, generation, layout, 1 AS code_factor, 8 AS code_bits "
    "FROM main.state",
    "CREATE TEMP VIEW segments AS SELECT segment, name, rows, 0 AS dead, '' AS codes, 0 AS code_rows "
    "FROM main.segments",
    "CREATE TEMP VIEW pages AS SELECT key, segment, start, rows, crc32, id, source, number, label, sha256, image, "
    "0 AS code_start, 0 AS code_rows, 0.0 AS code_scale, 0 AS code_crc32 FROM main.pages",
    "CREATE TEMP VIEW contents AS SELECT key, metadata, text, shape, clusters, NULL AS crc32 FROM main.contents",
)


def migrate(connection: sqlite3.Connection, version: int, code_factor: int) -> None:
    """Make a catalogue of an older version one of this version, wholly or not at all.

    Args:
        connection: the writer's, outside a transaction.
        version: of the catalogue.
        code_factor: tokens for each row of a page's code, from now on, where the catalogue knows no codes.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in (*(_FROM_VERSION_1 if version == 1 else ()), *_FROM_VERSION_2):
            connection.execute(statement)
        if version == 1:
            connection.execute("UPDATE state SET code_factor = ?, layout = layout + 1", (code_factor,))
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def view_as_current(connection: sqlite3.Connection, version: int) -> None:
    """Let a connection for reading see a catalogue of an older version as one of this; of version 1 without codes."""
    for statement in _VIEWS_OF_VERSION_1 if version == 1 else _VIEWS_OF_VERSION_2:
        connection.execute(statement)
