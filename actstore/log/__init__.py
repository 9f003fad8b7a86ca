"""What does the store hold, at which version, and how does the next version come to be? (FORMAT.md, sections 4 and 5)"""

from actstore.log.canonical import canonical_json, fingerprint
from actstore.log.commit import CommitLog, Committed
from actstore.log.fsck import FsckReport, Problem, fsck
from actstore.log.state import State

__all__ = [
    "CommitLog",
    "Committed",
    "FsckReport",
    "Problem",
    "State",
    "canonical_json",
    "fingerprint",
    "fsck",
]
