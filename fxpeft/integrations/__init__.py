"""fxpeft inside other libraries: each file here is one library, and imports point from here to fxpeft's own code."""
