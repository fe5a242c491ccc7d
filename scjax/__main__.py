"""`python -m scjax`: the same commands as `scjax`."""

from scjax.cli import main

if __name__ == "__main__":
    main()
