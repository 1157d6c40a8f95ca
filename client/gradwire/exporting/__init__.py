"""From a module to a checked graph, step by step."""
