"""Against real servers: Postfix, gunicorn, uvicorn."""
