"""Fine-tuning with a frozen trunk: the vectors of texts, made once, and heads solved over them."""
