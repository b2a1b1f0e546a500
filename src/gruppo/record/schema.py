"""Tables of run.sqlite. Anyone may read them with the sqlite3 program; these notes say how.

Text columns hold TEXT, or, where a string is no valid Unicode (lone surrogates), a BLOB of its
UTF-8 with surrogates passed through. Blobs are little-endian: token ids int32, log-probabilities
and advantages float32, masks one byte per token. A metric that was NaN is NULL. ``detail``,
``prompt``, ``parts`` (raw values), ``counted`` (what counted in the place of a raw value that a
clip or gate changed, before its weight; NULL if none was), ``failure`` and ``interaction`` (the
episode with an environment: dialogue, calls, reward, what ended it) are JSON. Times are seconds
since 1970 (UTC); nothing is ordered by them.
"""

from __future__ import annotations

VERSION = 3  # PRAGMA user_version; raised when an older gruppo could misread the tables

# Tables whose rows belong to a step, in the order in which they are cleared.
STEP_TABLES = (
    "steps",
    "metrics",
    "groups",
    "completions",
    "evaluations",
    "samples",
    "findings",
    "events",
)

UPGRADES = {
    1: "ALTER TABLE completions ADD COLUMN interaction TEXT",
    2: "ALTER TABLE completions ADD COLUMN counted TEXT",
}
"""What turns the tables of a version into those of the next."""

TABLES = """
CREATE TABLE steps (
    step INTEGER PRIMARY KEY,
    time REAL NOT NULL
);
CREATE TABLE metrics (
    step INTEGER NOT NULL,
    name TEXT NOT NULL,
    value REAL,
    PRIMARY KEY (step, name)
) WITHOUT ROWID;
CREATE TABLE groups (
    step INTEGER NOT NULL,
    group_index INTEGER NOT NULL,
    problem TEXT NOT NULL,
    source TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT,
    prompt_tokens BLOB,
    baseline REAL,
    PRIMARY KEY (step, group_index)
);
CREATE TABLE completions (
    step INTEGER NOT NULL,
    group_index INTEGER NOT NULL,
    row INTEGER NOT NULL,
    text TEXT NOT NULL,
    tokens BLOB,
    logp BLOB,
    mask BLOB,
    token_advantage BLOB,
    num_tokens INTEGER NOT NULL,
    version INTEGER,
    advantage REAL,
    total REAL,
    task REAL,
    parts TEXT NOT NULL,
    finish TEXT NOT NULL,
    failure TEXT,
    interaction TEXT,
    counted TEXT,
    PRIMARY KEY (step, group_index, row)
);
CREATE TABLE evaluations (
    step INTEGER NOT NULL,
    name TEXT NOT NULL,
    value REAL,
    PRIMARY KEY (step, name)
) WITHOUT ROWID;
CREATE TABLE samples (
    step INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    problem TEXT NOT NULL,
    source TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT,
    text TEXT NOT NULL,
    total REAL,
    task REAL,
    finish TEXT NOT NULL,
    PRIMARY KEY (step, sample)
);
CREATE TABLE findings (
    step INTEGER NOT NULL,
    id TEXT NOT NULL,
    severity TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX findings_by_step ON findings (step);
CREATE TABLE events (
    time REAL NOT NULL,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX events_by_step ON events (step);
"""
