"""The command ``mixlora``, with a file for each subcommand. A subcommand imports what it needs when it runs."""
