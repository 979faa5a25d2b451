"""PEFT's files, both ways, and adapters that need no model."""
