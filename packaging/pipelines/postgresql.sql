-- Where rsyslog.conf puts finrace's records: PostgreSQL 12 or later. As the database's owner: psql -d finrace -f postgresql.sql
--
-- A record is one jsonb, unchanged; the columns beside it are computed from it, typed and indexed for what is asked most. Its key
-- is (host, run, sequence), so a record that comes twice is there once. record ->> 'any.other.name' reads what has no column.
CREATE SCHEMA IF NOT EXISTS finrace;

-- RFC 3339 in UTC, as finrace writes it, is the same moment whatever the session's time zone: so these may be computed columns.
CREATE OR REPLACE FUNCTION finrace.moment(stamp text) RETURNS timestamptz LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS
$$ SELECT stamp::timestamptz $$;

-- Nanoseconds since 1970, of which timestamptz keeps microseconds.
CREATE OR REPLACE FUNCTION finrace.unix_nano(stamp text) RETURNS bigint LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS
$$ SELECT extract(epoch FROM (left(stamp, 19) || 'Z')::timestamptz)::bigint * 1000000000
          + rpad(coalesce(substring(stamp FROM '\.(\d{1,9})'), ''), 9, '0')::bigint $$;

CREATE TABLE IF NOT EXISTS finrace.records (
    record        jsonb       NOT NULL,
    time          timestamptz NOT NULL GENERATED ALWAYS AS (finrace.moment(record ->> 'timestamp')) STORED,
    unix_nano     bigint      NOT NULL GENERATED ALWAYS AS (finrace.unix_nano(record ->> 'timestamp')) STORED,
    event         text        NOT NULL GENERATED ALWAYS AS (record ->> 'event.name') STORED,
    host          text        NOT NULL GENERATED ALWAYS AS (record ->> 'host.name') STORED,
    run           text        NOT NULL GENERATED ALWAYS AS (record ->> 'finrace.run') STORED,
    sequence      bigint      NOT NULL GENERATED ALWAYS AS ((record ->> 'finrace.sequence')::bigint) STORED,
    cause         text        GENERATED ALWAYS AS (record ->> 'finrace.cause') STORED,
    certainty     text        GENERATED ALWAYS AS (record ->> 'finrace.certainty') STORED,
    side          text        GENERATED ALWAYS AS (record ->> 'finrace.side') STORED,
    peer_address  inet        GENERATED ALWAYS AS ((record ->> 'network.peer.address')::inet) STORED,
    peer_port     integer     GENERATED ALWAYS AS ((record ->> 'network.peer.port')::integer) STORED,
    local_address inet        GENERATED ALWAYS AS ((record ->> 'network.local.address')::inet) STORED,
    local_port    integer     GENERATED ALWAYS AS ((record ->> 'network.local.port')::integer) STORED,
    PRIMARY KEY (host, run, sequence)
);
CREATE INDEX IF NOT EXISTS records_time ON finrace.records USING brin (time);
CREATE INDEX IF NOT EXISTS records_verdicts ON finrace.records (time, cause) WHERE event = 'finrace.verdict';

CREATE TABLE IF NOT EXISTS finrace.rejected (
    time timestamptz NOT NULL DEFAULT now(),
    line text        NOT NULL,
    why  text        NOT NULL
);

-- One line of finrace's. Never fails for what the line says: a statement that fails would be tried for ever, and all after it.
CREATE OR REPLACE FUNCTION finrace.take(line text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO finrace.records (record) VALUES (line::jsonb) ON CONFLICT DO NOTHING;
EXCEPTION WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded THEN
    INSERT INTO finrace.rejected (line, why) VALUES (line, SQLERRM);
END $$;
