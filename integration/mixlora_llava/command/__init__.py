"""The command ``mixlora``: a file for each subcommand, which imports what it needs when it runs."""
