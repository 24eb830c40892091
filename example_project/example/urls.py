"""The example's URLs."""

from django.contrib import admin
from django.templatetags.static import static
from django.urls import path
from django.views.generic import RedirectView

from .receivers import recording
from .views import compose, inbox, pool, race, settings

urlpatterns = [
    path("", compose.compose, name="compose"),
    path("contact/", recording(compose.contact), name="contact"),
    path("contact-async/", recording(compose.contact_async), name="contact-async"),
    path("sent/<int:number>/", compose.sent, name="sent"),
    path("inbox/", inbox.inbox, name="inbox"),
    path("inbox/events/", inbox.inbox_events, name="inbox-events"),
    path("inbox/<int:number>/", inbox.message, name="message"),
    path("inbox/<int:number>/html/", inbox.message_html, name="message-html"),
    path("inbox/<int:number>/<int:index>/", inbox.attachment, name="attachment"),
    path("settings/", settings.mailers, name="settings"),
    path("settings/events/", settings.findings, name="settings-events"),
    path("race/", race.race_page, name="race"),
    path("race/run/", race.run_race, name="race-run"),
    path("pool/", pool.pool, name="pool"),
    path("pool/events/", pool.pool_events, name="pool-events"),
    path("pool/send/", pool.send_at_once, name="pool-send"),
    path("admin/", admin.site.urls),
    # For the admin's pages, which name no icon.
    path("favicon.ico", RedirectView.as_view(url=static("example/icon.svg"))),
]
