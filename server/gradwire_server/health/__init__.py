"""Whether the service lives, and whether it is ready: two questions, each with an answer for whoever asks."""
