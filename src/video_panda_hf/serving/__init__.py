"""Servers that answer questions about videos."""
