"""`python -m sparseft`."""

from sparseft.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
