"""How the repository's default checkpoint is made from nothing: tokenizer, encoder pretraining, assembly."""
