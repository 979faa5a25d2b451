"""``python -m fxpeft``."""

from fxpeft.tools.cli import main

if __name__ == "__main__":
    main()
