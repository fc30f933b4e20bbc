"""The special value of labels."""

IGNORE_INDEX = -100
"""Label of a position that bears no loss; torch's default."""
