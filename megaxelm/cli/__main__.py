"""`python -m megaxelm.cli`: the `megaxelm` command where its script is not on the PATH."""

from megaxelm.cli import main

main()
