"""Architectures on a rank: modules that it builds itself, out of an allowlist of classes."""
