"""``python -m mixlora_llava`` runs the command ``mixlora``, for example from a launcher."""

from .command.main import main

if __name__ == "__main__":
    main()
