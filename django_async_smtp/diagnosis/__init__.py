"""
What a message meets on its way to the server, stage by stage, and what to do about it.

The steps are those that sending takes: what passes here is what sends. No Django, and
no printing.
"""

from .findings import STATES, Finding, StageReport, State
from .stages import SIDE_STAGES, STAGES, StageName, diagnose

__all__ = [
    "SIDE_STAGES",
    "STAGES",
    "STATES",
    "Finding",
    "StageName",
    "StageReport",
    "State",
    "diagnose",
]
