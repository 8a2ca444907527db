"""``python -m mixlora_llava`` is the command ``mixlora``, also where a launcher starts it."""

from .command.main import main

if __name__ == "__main__":
    main()
