"""Measurements of mmssl beside its peers."""
