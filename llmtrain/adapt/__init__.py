"""Parameter-efficient fine-tuning: small new parameters beside the frozen ones of an ordinary module, put
there from outside by patterns of names."""
