"""The example's URLs."""

from django.urls import path

from . import views

urlpatterns = [
    path("contact/", views.contact),
    path("contact-async/", views.contact_async),
]
