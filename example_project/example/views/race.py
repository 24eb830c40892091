"""Race: Django's backend and this one, side by side."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_POST, require_safe

from ..events import event_stream
from ..forms import RaceForm
from ..race import race


@require_safe
def race_page(request: HttpRequest) -> HttpResponse:
    """Show the form; the race's events come in answer to it."""
    return render(request, "example/race.html", {"form": RaceForm()})


@require_POST
async def run_race(request: HttpRequest) -> HttpResponseBase:
    """Run a race; it stops when the client goes away."""
    form = RaceForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors}, status=400)
    return event_stream(race(**form.cleaned_data))
