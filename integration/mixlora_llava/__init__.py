"""The paper's system on LLaVA: train, evaluate, chat, convert, analyse. See README.md beside this file."""
