"""Text: token ids from text and back, chat templates, stop strings. Knows no HTTP and no engine."""
