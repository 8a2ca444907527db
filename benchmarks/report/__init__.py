"""What the rows say: as text, JSON and Markdown, as pictures, and beside the bars."""
