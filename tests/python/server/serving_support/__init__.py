"""Tiny models, a scripted engine and a live server, for the tests of serving."""
