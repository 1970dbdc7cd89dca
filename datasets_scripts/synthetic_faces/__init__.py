"""Rendered faces with exact labels: an open data set for all three tasks (see `docs/synthetic_faces.md`)."""
