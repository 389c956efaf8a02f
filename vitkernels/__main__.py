"""``python -m vitkernels``: the command line."""

from vitkernels.cli import main

if __name__ == "__main__":
    main()
