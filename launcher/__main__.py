"""`python -m headway.launcher` is the `headway` command."""

from headway.launcher.cli.main import run

if __name__ == "__main__":
    run()
