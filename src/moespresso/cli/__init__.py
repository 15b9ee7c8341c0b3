"""The command line."""

from moespresso.cli.app import main

__all__ = ["main"]
