"""fxpeft inside other libraries: each file here is one library, imported only inside of its own."""
