"""`python -m headway.launcher.cli` is the `headway` command."""

from headway.launcher.cli.main import run

if __name__ == "__main__":
    run()
