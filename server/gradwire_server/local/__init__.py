"""Clients on the machine of the service: memory that they share with it, and calls."""
