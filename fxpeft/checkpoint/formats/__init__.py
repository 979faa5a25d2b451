"""Files that are not PEFT's two: one file a format, told apart by their keys."""

from fxpeft.checkpoint.formats.choosing import FORMATS, PipelineFile, read_file

__all__ = ["FORMATS", "PipelineFile", "read_file"]
