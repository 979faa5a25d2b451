"""Whole programs: exported, packaged, compiled by a backend of their own."""
