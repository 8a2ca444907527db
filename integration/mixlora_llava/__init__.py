"""The paper's system on LLaVA: train, evaluate, chat, convert, analyse. README.md in this folder describes it."""
