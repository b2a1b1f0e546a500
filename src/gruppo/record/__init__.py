"""Everything a run leaves behind: its folder, database, trackers and dumps."""

from gruppo.record.database import Database, Detail
from gruppo.record.dump import dump_step, replay_command
from gruppo.record.export import export_samples, sample_line
from gruppo.record.rows import Event, Finding, StoredCompletion, StoredSample, Tokens
from gruppo.record.run import RunDirectory, check_name, check_unused
from gruppo.record.scrub import scrub, scrub_values
from gruppo.record.trackers import TensorBoard, Tracker, Trackio, Wandb, client_of

__all__ = [
    "Database",
    "Detail",
    "Event",
    "Finding",
    "RunDirectory",
    "StoredCompletion",
    "StoredSample",
    "TensorBoard",
    "Tokens",
    "Tracker",
    "Trackio",
    "Wandb",
    "check_name",
    "check_unused",
    "client_of",
    "dump_step",
    "export_samples",
    "replay_command",
    "sample_line",
    "scrub",
    "scrub_values",
]
