"""Where the examples run: the service at $GRADWIRE_TARGET where that is set, otherwise one of their own."""

from __future__ import annotations

import os

import gradwire


def open_service() -> gradwire.Client:
    """A client; leaving its `with` block ends an embedded service too."""
    return gradwire.connect() if "GRADWIRE_TARGET" in os.environ else gradwire.launch(workers=2)
