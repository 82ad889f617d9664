"""The Textual chat: one screen or widget per file."""
