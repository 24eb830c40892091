"""A small Django project that sends its mail through django-async-smtp."""
