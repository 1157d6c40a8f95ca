"""Processes that wait with torch imported."""
