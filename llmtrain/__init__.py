"""llmtrain trains large models: one command from a folder of text to an exported model."""

__version__ = "0.1.0"
