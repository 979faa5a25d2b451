"""``python -m fxpeft.gpu_check``: what fxpeft promises, checked and measured on a GPU; see :mod:`fxpeft.tools`."""

from fxpeft.tools.gpu_check import gpu_check


def main() -> None:
    """Run the command."""
    import typer

    typer.run(gpu_check)


if __name__ == "__main__":
    main()
