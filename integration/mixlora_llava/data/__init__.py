"""The training data: records, conversations and images, which are checked before they are used."""
