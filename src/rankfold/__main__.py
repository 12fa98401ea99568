"""`python -m rankfold`, for launchers that start modules."""

from rankfold.cli import main

if __name__ == "__main__":
    main()
