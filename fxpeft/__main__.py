"""``python -m fxpeft``."""

import argparse

import fxpeft


def main(arguments: list[str] | None = None) -> None:
    """Command line: so far it tells the version."""
    parser = argparse.ArgumentParser(prog="fxpeft", description=fxpeft.__doc__)
    parser.add_argument("--version", action="version", version=f"fxpeft {fxpeft.__version__}")
    parser.parse_args(arguments)
    parser.print_help()


if __name__ == "__main__":
    main()
