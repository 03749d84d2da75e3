"""`python -m megaxelm.cli`: what the command `megaxelm` is."""

from megaxelm.cli import main

if __name__ == "__main__":
    main()
