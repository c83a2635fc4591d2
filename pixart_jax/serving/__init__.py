"""Serving a model: one engine, and in front of it an HTTP API, tools for agents and a web page."""
