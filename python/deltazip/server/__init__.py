"""The OpenAI-compatible HTTP server: python -m deltazip.server --base DIR --variant name=DIR."""
