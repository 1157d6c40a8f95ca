"""`gradwire load-test`: how many requests a service takes, and how long each waits. `command.py` is where to start."""
