"""Doors for people: the `longstride` command."""
