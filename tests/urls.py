"""No URLs by default."""

from typing import Any

urlpatterns: list[Any] = []
