"""The codec, part by part."""
