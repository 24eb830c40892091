"""Benchmarks against Django's own backend and nodemailer; see `make bench`."""
