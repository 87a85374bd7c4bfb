"""`python -m droidspeak` is the `droidspeak` command."""

from droidspeak.integrations.cli.main import main

if __name__ == "__main__":
    main()
