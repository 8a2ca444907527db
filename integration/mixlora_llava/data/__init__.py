"""What is trained on: records, conversations and images, checked before they are used."""
