"""The tables.

Everything here is derived from the log and could be deleted. There is no PRIMARY KEY, no UNIQUE constraint and no
index on purpose: identity is checked in memory before a row is written (``aggregator.seen``), and DuckDB's indexes
cost more than that check, grow with every row, and have returned nothing after a crash. Amounts are never stored
here: they are read from the metadata text when asked for, so a new meter counts the past as it counts the future.

The two long texts are packed with zstd: as small as what DuckDB would choose, at half the cost of a checkpoint, because
nothing else is tried first.

A dead letter may be a whole record of 24 MiB. DuckDB handles 2,048 values of a column at once, whatever their size, and
a hundred of those are more than its memory: so ``dead_letters`` has the beginning of the bytes, and ``dead_rests`` the
others in parts (``aggregator.letters``).

A file of another layout is not changed: it is refused, and ``meterstream rebuild`` makes the store again from the log.
"""

VERSION = 5

TABLES = """
CREATE TABLE about (version INTEGER, writer_epoch BIGINT);
CREATE TABLE streams (stream VARCHAR, identity VARCHAR);
CREATE TABLE positions (
    stream VARCHAR, log_partition INTEGER, next_offset BIGINT,
    last_us BIGINT, -- the log's time of the record before, NULL where not known
    stored BIGINT, duplicates BIGINT, conflicts BIGINT, dead BIGINT
);
CREATE TABLE organizations (number INTEGER, id VARCHAR);
CREATE TABLE subjects (number INTEGER, organization INTEGER, kind VARCHAR, text VARCHAR);
CREATE TABLE events (
    seq BIGINT, log_partition INTEGER, log_offset BIGINT, line INTEGER,
    id_hi UBIGINT, id_lo UBIGINT, content UBIGINT,
    organization INTEGER, subject INTEGER, name VARCHAR, source VARCHAR,
    timestamp TIMESTAMP, ingested_at TIMESTAMP,
    external_id VARCHAR USING COMPRESSION zstd, parent VARCHAR, member_id VARCHAR, external_member_id VARCHAR,
    metadata VARCHAR USING COMPRESSION zstd, awkward VARCHAR
);
CREATE TABLE pending (
    id_hi UBIGINT, id_lo UBIGINT, organization INTEGER, parent VARCHAR,
    parent_hi UBIGINT, parent_lo UBIGINT, other_hi UBIGINT, other_lo UBIGINT
);
CREATE TABLE hierarchy (
    id_hi UBIGINT, id_lo UBIGINT, parent_hi UBIGINT, parent_lo UBIGINT,
    root_hi UBIGINT, root_lo UBIGINT, depth INTEGER
);
CREATE TABLE dead_letters (
    number BIGINT, log_partition INTEGER, log_offset BIGINT, line INTEGER, organization_id VARCHAR,
    reason VARCHAR, detail VARCHAR, raw BLOB, raw_bytes INTEGER, -- of all its parts
    ingested_at TIMESTAMP, replayed_at TIMESTAMP
);
CREATE TABLE dead_rests (log_partition INTEGER, log_offset BIGINT, line INTEGER, part INTEGER, raw BLOB);
CREATE VIEW tallies AS
    SELECT log_partition, stored, duplicates, conflicts, dead FROM positions WHERE stream = 'usage.events';
CREATE TABLE control (log_offset BIGINT, value VARCHAR);
CREATE TABLE webhook_causes (
    number BIGINT, organization_id VARCHAR, subject INTEGER, customer_id VARCHAR, change VARCHAR, caused_at TIMESTAMP
);
CREATE TABLE webhook_messages (
    id VARCHAR, endpoint_id VARCHAR, organization_id VARCHAR, type VARCHAR, customer_id VARCHAR,
    body VARCHAR USING COMPRESSION zstd, caused_at TIMESTAMP, created_at TIMESTAMP, due_at TIMESTAMP,
    attempts INTEGER, status VARCHAR, settled_at TIMESTAMP
);
CREATE TABLE webhook_attempts (
    id VARCHAR, message_id VARCHAR, endpoint_id VARCHAR, organization_id VARCHAR, number INTEGER,
    started_at TIMESTAMP, took_ms INTEGER, status_code INTEGER, outcome VARCHAR
);
"""
