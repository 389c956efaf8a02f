"""What an installed vitkernels is made of: its files, its symbols, and how it behaves where parts are missing."""
