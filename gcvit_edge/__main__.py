"""`python -m gcvit_edge`."""

from gcvit_edge.cli import entry_point

if __name__ == "__main__":
    entry_point()
