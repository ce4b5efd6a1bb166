"""Doors for other programs: the MQTT worker."""
