"""`python -m cppo.cli`, for launchers that start a module."""

from cppo.cli.app import main

main()
