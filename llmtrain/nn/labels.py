"""What a label says besides a class."""

IGNORE_INDEX = -100
"""Label of a position that bears no loss; torch's own default."""
