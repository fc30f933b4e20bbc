"""Tables of labelled texts, straight from files: rows, splits, and their tokens in a cache."""
