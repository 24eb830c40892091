"""Mail through the project's task queue (Django Tasks), on the engine that it has."""

from .backend import QueuedBackend

__all__ = ["QueuedBackend"]
