"""The paper's system on LLaVA: patch, train, evaluate, convert, analyse, chat. See README.md beside this file."""
